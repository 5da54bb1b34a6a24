"""What /generate is asked and what it answers, as SGLang 0.5.23 has it; data only, no connection.

Two things are asked: an answer to a prompt (`Draw` -> `Drawn`), and what the model says about given tokens (`Ask` -> a
teacher's score). Requests are checked before they are sent, because an id outside the vocabulary, a k above its size or
an over-long prompt ends the server's scheduler or the request; answers are checked before they are believed.

Shape suffixes: R response tokens, K listed ids, D hidden size.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_opd.core.scores import Hidden, Sampled, TeacherScore, TopK
from megatron_opd.sglang.errors import BadAnswer, Refused

BANNED = -1e4
"""Added to the logits of ids that must not be sampled: their probability is exactly 0 in float32, and JSON has it."""
FINISH = ("stop", "length", "abort")
RESERVED = 7
"""Tokens by which what is sent must be shorter than the server's context."""
MAX_CUT = 4096
"""Tokens that are left by top-p alone, at most (the server's --sampling-mask-max-tokens)."""
PROBABILITY_SLACK = 1e-3
"""How far above 0 rounding may take a log-probability (bf16 servers)."""
LEAST = torch.finfo(torch.float32).min
"""Of what a log-probability may be; comparing does not mind how large an int is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLimits:
    """What a server takes without harm."""

    vocab_size: int
    """Ids that the model has: [0, vocab_size)."""
    context: int
    """Its --context-length: what is sent and what is sampled, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Sample one answer. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 leave all tokens."""

    rid: str
    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()
    seed: int = 0
    is_fixed: bool = False
    """The weights never change, whatever the server calls them; their version is 0."""

    @property
    def is_cut(self) -> bool:
        """Whether only some tokens may be sampled, so that the log-probabilities of all are not the sampler's."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sampled tokens, each with its behaviour log-probability and the version of the weights that it came from."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    versions: tuple[int, ...]
    finish: Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the model says about `ids[first:]`, each token given all before it, at temperature 1."""

    rid: str
    ids: tuple[int, ...]
    first: int
    carrier: Literal["hidden", "topk", "sampled"]
    top_k: int = 0


def draw_body(draw: Draw, limits: ServerLimits) -> dict[str, Any]:
    """The request. Raises Refused for what no server may be sent."""
    _check_ids(draw.ids, "the prompt", limits)
    _check_ids(draw.stop_ids, "stop_ids", limits, may_be_empty=True)
    _check_ids(draw.banned_ids, "banned_ids", limits, may_be_empty=True)
    _check(draw.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {draw.max_new_tokens}")
    _check_length(len(draw.ids), draw.max_new_tokens, limits)
    finite = math.isfinite(draw.temperature) and draw.temperature >= 0
    _check(finite, f"the temperature must be finite and not negative, not {draw.temperature}")
    _check(0 < draw.top_p <= 1, f"top_p must lie in (0, 1], not {draw.top_p}")
    _check(0 <= draw.top_k <= limits.vocab_size, f"top_k must lie in [0, {limits.vocab_size}], not {draw.top_k}")
    sampling: dict[str, Any] = {
        "max_new_tokens": draw.max_new_tokens,
        "temperature": draw.temperature,
        "top_p": draw.top_p,
        # The server tells the distribution that it sampled from only when it is cut to finitely many tokens.
        "top_k": draw.top_k or (min(limits.vocab_size, MAX_CUT) if draw.is_cut else -1),
        "stop_token_ids": list(draw.stop_ids),
        "skip_special_tokens": False,
        "sampling_seed": draw.seed,  # heeded under --enable-deterministic-inference only
    }
    if draw.banned_ids:
        sampling["logit_bias"] = {str(i): BANNED for i in draw.banned_ids}
    body = {"rid": draw.rid, "input_ids": list(draw.ids), "sampling_params": sampling, "return_logprob": True}
    if draw.is_cut:
        body |= {"return_sampling_mask": True, "sampling_logprobs_mode": "selected"}
    return body


def read_drawn(draw: Draw, answer: Any, limits: ServerLimits) -> Drawn:
    """Raises BadAnswer for anything that is not a complete, consistent answer."""
    ids, meta = _field(answer, "output_ids", list), _field(answer, "meta_info", dict)
    finish = _field(meta, "finish_reason", dict).get("type")
    _believe(finish in FINISH, f"finish_reason {finish!r} is unknown")
    if not ids and finish == "abort":  # aborted while it waited: the fields of tokens are missing
        return Drawn((), (), (), "abort")
    _believe(all(_is_id(i, limits) for i in ids), f"ids that are not all in [0, {limits.vocab_size})")
    logps = _logps(_field(meta, "output_token_logprobs", list), ids)
    if draw.is_cut:
        logps = _numbers(_field(meta, "output_token_sampling_logprobs", list))
        _believe(len(logps) == len(ids), f"{len(logps)} sampling log-probabilities for {len(ids)} tokens")
    _believe(0 < len(ids) <= draw.max_new_tokens, f"{len(ids)} tokens, where 1 to {draw.max_new_tokens} were asked for")
    _believe(
        finish != "length" or len(ids) == draw.max_new_tokens, f"cut at {len(ids)} of {draw.max_new_tokens} tokens"
    )
    _believe(not set(ids) & set(draw.banned_ids), "an id that must not be sampled")
    if finish == "stop" and ids[-1] not in draw.stop_ids:
        raise Refused(
            f"the server ends an answer at token {ids[-1]}, but the run's end-of-sequence tokens are {draw.stop_ids}:"
            " let config.json and generation_config.json of student.model agree"
        )
    versions = (0,) * len(ids) if draw.is_fixed else _versions(_field(meta, "weight_versions", list), len(ids))
    return Drawn(tuple(ids), tuple(logps), versions, finish)


def ask_body(ask: Ask, limits: ServerLimits) -> dict[str, Any]:
    """The request. Raises Refused for what no server may be sent."""
    _check_ids(ask.ids, "the tokens to score", limits)
    _check(0 < ask.first < len(ask.ids), f"there is nothing before or nothing after position {ask.first}")
    hidden = ask.carrier == "hidden"
    _check_length(len(ask.ids), int(hidden), limits)
    body = {
        "rid": ask.rid,
        "input_ids": list(ask.ids),
        # Hidden states come with a forward pass that samples; log-probabilities of the input come without one.
        "sampling_params": {"max_new_tokens": int(hidden), "temperature": 0.0, "skip_special_tokens": False},
        "return_logprob": True,
        # Also keeps the prefix cache from swallowing the positions from here on.
        "logprob_start_len": ask.first - 1,
    }
    if hidden:
        body["return_hidden_states"] = True
    elif ask.carrier == "topk":
        _check(1 <= ask.top_k <= limits.vocab_size, f"top_k must lie in [1, {limits.vocab_size}], not {ask.top_k}")
        body |= {
            "top_logprobs_num": ask.top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    return body


def read_score(ask: Ask, answer: Any, limits: ServerLimits) -> TeacherScore:
    """Raises BadAnswer for anything that is not about exactly the tokens of `ask`."""
    meta = _field(answer, "meta_info", dict)
    # Entry 0 is the token before the response, which has no log-probability here.
    entries = _field(meta, "input_token_logprobs", list)[1:]
    logps = _logps(entries, list(ask.ids[ask.first :]), shown_as_0=limits.vocab_size - 1)
    logp_R = torch.tensor(logps, dtype=torch.float32)
    if ask.carrier == "sampled":
        return Sampled(logp_R)
    if ask.carrier == "hidden":
        return Hidden(_hidden(ask, meta))
    return _top_k(ask, meta, logp_R, limits)


def _top_k(ask: Ask, meta: dict[str, Any], logp_R: torch.Tensor, limits: ServerLimits) -> TopK:
    rows, k = len(logp_R), ask.top_k
    shape, prefix = _field(meta, "input_top_logprobs_shape", list), meta.get("input_top_logprobs_null_prefix")
    _believe(
        shape == [rows, k] and prefix == 1, f"top log-probabilities {shape} after {prefix}, not {[rows, k]} after 1"
    )
    logp_RK = _array(meta, "input_top_logprobs_val_flat_b64", np.dtype("<f4"), (rows, k))
    ids_RK = _array(meta, "input_top_logprobs_idx_flat_b64", np.dtype("<i4"), (rows, k)).long()
    _believe(bool(logp_RK.isfinite().all() and (logp_RK <= PROBABILITY_SLACK).all()), "a log-probability is not one")
    _believe(bool(((ids_RK >= 0) & (ids_RK < limits.vocab_size)).all()), "an id is outside the vocabulary")
    ordered_RK = ids_RK.sort(-1).values
    _believe(bool((ordered_RK[:, 1:] != ordered_RK[:, :-1]).all()), "an id is listed twice")
    sampled_R = torch.tensor(ask.ids[ask.first :])
    absent_R = (ids_RK != sampled_R[:, None]).all(-1)
    last_R = logp_RK.argmin(-1)[absent_R]  # descending in theory; ties and other servers do not matter then
    ids_RK[absent_R, last_R] = sampled_R[absent_R]
    logp_RK[absent_R, last_R] = logp_R[absent_R]
    return TopK(ids_RK, logp_RK)


def _hidden(ask: Ask, meta: dict[str, Any]) -> torch.Tensor:
    """[R, D]. The server lists the positions that it computed, a block a forward pass; before them is its cache."""
    if "hidden_states" not in meta:
        raise Refused("the server gives no hidden states: start it with --enable-return-hidden-states")
    rows: list[Any] = []
    for block in _field(meta, "hidden_states", list):
        _believe(isinstance(block, list) and bool(block) and isinstance(block[0], list), "hidden states out of order")
        rows += block
    # What there is ends with the last position; the state at a position predicts the token after it.
    start = len(rows) - (len(ask.ids) - ask.first) - 1
    _believe(
        0 <= start < ask.first,
        f"hidden states of {len(rows)} positions, which are not those of the response (is it cut by chunked prefill?)",
    )
    try:
        hidden_RD = torch.tensor(rows[start:-1], dtype=torch.float32)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise BadAnswer(f"hidden states are not rows of numbers: {error}") from None
    _believe(hidden_RD.dim() == 2 and bool(hidden_RD.isfinite().all()), "hidden states are not finite")
    return hidden_RD


def _versions(spans: Sequence[Any], count: int) -> tuple[int, ...]:
    """Spans [{version, start, end}] -> a version for each of `count` tokens."""
    versions: list[int] = []
    for span in spans:
        try:
            version, start, end = int(span["version"]), span["start"], span["end"]
        except (TypeError, KeyError, ValueError, OverflowError):
            raise BadAnswer(f"not a span of a version of ours: {span!r}; were the weights given to it?") from None
        _believe(
            start == len(versions) and isinstance(end, int) and start <= end <= count,
            f"the spans of versions have a gap: {span}",
        )
        versions += [version] * (end - start)
    _believe(len(versions) == count, f"versions of {len(versions)} tokens for {count}")
    return tuple(versions)


def _logps(entries: list[Any], ids: list[int], *, shown_as_0: int = -1) -> list[float]:
    """Log-probabilities of [logp, id, text] entries, which must be those of `ids`.

    0.5.23 writes 0 for the last id of the vocabulary in a prompt (as for placeholders of images); the number beside it
    is right.
    """
    _believe(len(entries) == len(ids), f"log-probabilities of {len(entries)} tokens for {len(ids)}")
    _believe(all(isinstance(e, list) and len(e) >= 2 for e in entries), "a log-probability without its id")
    same = all(e[1] == i or (i == shown_as_0 and e[1] == 0) for e, i in zip(entries, ids, strict=True))
    _believe(same, "log-probabilities of other tokens than those asked about")
    return _numbers([e[0] for e in entries])


def _numbers(values: list[Any]) -> list[float]:
    """Finite log-probabilities. A bool is an int to Python, and no number here."""
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _believe(is_number and LEAST <= value <= PROBABILITY_SLACK, f"{value!r:.40} is no log-probability")
    return [min(float(value), 0.0) for value in values]


def _array(meta: dict[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> torch.Tensor:
    try:
        flat = np.frombuffer(base64.b64decode(_field(meta, name, str), validate=True), dtype)
        return torch.from_numpy(flat.reshape(shape).copy())
    except ValueError as error:
        raise BadAnswer(f"{name}: {error}") from None


def _field(holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    _believe(isinstance(value, kind), f"'{name}' is missing or no {kind.__name__}")
    return value


def _check_ids(ids: Iterable[int], what: str, limits: ServerLimits, *, may_be_empty: bool = False) -> None:
    ids = list(ids)
    _check(bool(ids) or may_be_empty, f"{what} must not be empty")
    wrong = [i for i in ids if not _is_id(i, limits)]
    _check(not wrong, f"{what}: ids must lie in [0, {limits.vocab_size}): {wrong[:5]}")


def _is_id(value: Any, limits: ServerLimits) -> bool:
    """A bool is an int to Python, and no id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limits.vocab_size


def _check_length(given: int, new: int, limits: ServerLimits) -> None:
    fits = given + RESERVED <= limits.context and given + new <= limits.context
    _check(fits, f"{given} tokens, {new} new ones and {RESERVED} that SGLang keeps need more than {limits.context}")


def _check(is_right: bool, wrong: str) -> None:
    if not is_right:
        raise Refused(f"not sent: {wrong}")


def _believe(is_right: bool, wrong: str) -> None:
    if not is_right:
        raise BadAnswer(wrong)
