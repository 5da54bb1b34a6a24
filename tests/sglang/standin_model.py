"""The made-up model behind the stand-in: everything follows from a hash of the tokens before."""

import base64
import hashlib

import numpy as np

VOCAB_SIZE, HIDDEN_SIZE, CONTEXT = 40, 6, 64
END = 2
"""The end-of-sequence token of config.json, at which the server stops by itself."""
VERSION = "0"
"""Of the weights that it starts with; the real one says "default"."""


def _random(*parts):
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def logits(before, seed=0):
    """[V] float64, of the token after `before`."""
    return _random("logits", seed, tuple(before)).normal(scale=2.0, size=VOCAB_SIZE)


def hidden(before):
    """[H] float32: the final hidden state of the last token of `before`."""
    return _random("hidden", tuple(before)).normal(size=HIDDEN_SIZE).astype(np.float32)


def draw(seed, position):
    """In [0, 1): the random number of a request's token at a position of the whole sequence."""
    return _random("draw", seed, position).random()


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def logps(before, *, temperature=1.0, bias=None):
    """[V] float64, as the server reports them: after logit_bias and temperature, before top-k and top-p."""
    biased = logits(before)
    for i, value in (bias or {}).items():
        biased[int(i)] += value
    return log_softmax(biased / (temperature or 1.0))


def cut(logp, top_p, top_k):
    """[V] float64: renormalised over the tokens that top-k and top-p leave; -inf for the others."""
    order = np.argsort(-logp)
    probs = np.exp(logp[order])
    keep = (np.cumsum(probs) - probs <= top_p) & (np.arange(len(logp)) < (top_k if top_k > 0 else len(logp)))
    left = np.full_like(logp, -np.inf)
    left[order[keep]] = logp[order[keep]] - np.log(probs[keep].sum())
    return left


def b64(array, dtype):
    return base64.b64encode(np.asarray(array).astype(dtype).tobytes()).decode()
