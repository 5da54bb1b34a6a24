"""Answers with anything in any place: what is believed is whole, and all else ends as a BadAnswer or a Refused."""

import base64
import copy
import math

import numpy as np
import pytest
import torch

from megatron_opd.sglang import wire
from megatron_opd.sglang.errors import BadAnswer, Refused
from megatron_opd.sglang.wire import Ask, Draw, Limits

LIMITS = Limits(vocab_size=32, context=64)
DRAW = Draw(rid="r", ids=(3, 4), max_new_tokens=4, temperature=1.0, stop_ids=(7,))
IDS = [5, 6, 7]
ODD = [None, True, -1, 0.5, 32, 10**12, 10**400, math.nan, math.inf, "", "x", [], [[]], {}, {"a": 1}]


def drawn():
    meta = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.5, i, None] for i in IDS],
        "output_token_sampling_logprobs": [-0.25] * 3,
        "weight_versions": [{"version": "0", "start": 0, "end": 2}, {"version": "1", "start": 2, "end": 3}],
    }
    return {"output_ids": list(IDS), "meta_info": meta}


def scored():
    flat = {"val": np.full((3, 2), -0.5, "<f4"), "idx": np.tile(np.array([[1, 2]], "<i4"), (3, 1))}
    meta = {
        "input_token_logprobs": [[None, 4, None], *([-0.5, i, None] for i in IDS)],
        "hidden_states": [[[0.5, 1.5] for _ in range(4)], [[0.5, 1.5]]],
        "input_top_logprobs_shape": [3, 2],
        "input_top_logprobs_null_prefix": 1,
        **{f"input_top_logprobs_{n}_flat_b64": base64.b64encode(a.tobytes()).decode() for n, a in flat.items()},
    }
    return {"meta_info": meta}


def places(tree, at=()):
    """Every place in it, the outermost first."""
    yield at
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from places(value, (*at, key))


def with_odd(answer, at, odd):
    if not at:
        return odd
    changed = copy.deepcopy(answer)
    node = changed
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = odd
    return changed


def everything(answer):
    return [with_odd(answer, at, odd) for at in places(answer) for odd in ODD]


@pytest.mark.parametrize(
    "draw", [DRAW, Draw(rid="r", ids=(3,), max_new_tokens=4, temperature=1, top_p=0.5, stop_ids=(7,))]
)
def test_of_samples(draw):
    assert wire.read_drawn(draw, drawn(), LIMITS).versions == (0, 0, 1)
    for answer in everything(drawn()):
        try:
            got = wire.read_drawn(draw, answer, LIMITS)
        except (BadAnswer, Refused):
            continue
        assert all(type(i) is int and 0 <= i < 32 for i in got.ids), answer
        assert len(got.ids) == len(got.logps) == len(got.versions) <= 4, answer
        assert all(type(v) is float and v <= 0 and math.isfinite(v) for v in got.logps), answer
        assert all(type(v) is int for v in got.versions), answer


@pytest.mark.parametrize("carrier", ["sampled", "topk", "hidden"])
def test_of_scores(carrier):
    ask = Ask(rid="r", ids=(3, 4, *IDS), first=2, carrier=carrier, top_k=2)
    wire.read_score(ask, scored(), LIMITS)
    for answer in everything(scored()):
        try:
            got = wire.read_score(ask, answer, LIMITS)
        except (BadAnswer, Refused):
            continue
        for name in got.__slots__ if hasattr(got, "__slots__") else vars(got):
            assert torch.isfinite(getattr(got, name)).all(), answer
            assert getattr(got, name).shape[0] == len(IDS), answer


@pytest.mark.parametrize("wrong", [32, -1, True])
def test_ids_that_the_model_does_not_have(wrong):
    """Consistent in itself: a server of a model with another vocabulary."""
    answer = with_odd(with_odd(drawn(), ("output_ids", 1), wrong), ("meta_info", "output_token_logprobs", 1, 1), wrong)
    with pytest.raises(BadAnswer, match=r"ids that are not all in \[0, 32\)"):
        wire.read_drawn(DRAW, answer, LIMITS)
