"""Answers with anything in any place: what is believed is whole, and all else ends as a BadAnswer or a Refused."""

import base64
import copy
import math

import numpy as np
import pytest
import torch
from standin import settings
from standin_model import CONTEXT, VOCAB_SIZE

from megatron_opd.config import RolloutConfig
from megatron_opd.sglang import wire
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import BadAnswer, Down, Refused
from megatron_opd.sglang.weights.expected import Expected
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Ask, Draw, ServerLimits

LIMITS = ServerLimits(vocab_size=32, context=64)
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


ERROR = {"error": {"message": "upstream is gone"}}


@pytest.mark.parametrize(
    ("way", "path", "answer"),
    [
        ("disk", "/update_weights_from_disk", ERROR),
        ("disk", "/update_weights_from_disk", None),
        ("tensor", "/begin_weight_update", ERROR),
        ("tensor", "/update_weights_from_tensor", ERROR),
        ("tensor", "/end_weight_update", "done"),
        ("tensor", "/server_info", {"tp_size": None}),
        ("tensor", "/server_info", {"tp_size": "2"}),
        ("broadcast", "/server_info", {"tp_size": 0}),
        ("broadcast", "/init_weights_update_group", ERROR),
    ],
)
def test_instead_of_taking_weights(servers, loop, tmp_path, way, path, answer):
    """A proxy's 200 with an error in it: the server is left out of the update; the others, and the run, go on."""
    odd, sound = servers(2)
    odd.instead[path] = answer
    served = settings([odd, sound] if way != "broadcast" else [odd])
    sync = WeightPush(RolloutConfig(sync=way, servers=served), loop, model="m", write=write, spool=tmp_path / "spool")
    clients = [Client(url, served, vocab_size=VOCAB_SIZE, context=CONTEXT) for url in served.urls]
    try:
        if way == "broadcast":  # stand-ins are in no group
            with pytest.raises(Down, match=f"no server has taken the weights:\n.*{path}"):
                sync.push(clients, iter([("w", torch.zeros(1))]), 1)
            return
        failed = sync.push(clients, iter([("w", torch.zeros(1))]), 1)
        assert list(failed) == [odd.url]
        assert isinstance(failed[odd.url], BadAnswer)
        assert sound.version == "1"
    finally:
        sync.close()
        for client in clients:
            loop.run(client.close(), 10)


def write(weights, directory):
    list(weights)
    directory.mkdir(parents=True)


@pytest.mark.parametrize("ranks", [None, 7, [], [{}], [{"checksums": 1, "parallelism_info": [{"tp_rank": 0}]}], [None]])
def test_instead_of_checksums(tmp_path, loop, ranks):
    class Server:
        url = "http://server"

        async def server_info(self):
            return {"dtype": "float32", "device": "cpu"}

        async def checksums(self):
            return {"success": True, "ranks": ranks}

    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    expected, server = Expected(tmp_path), Server()
    loop.run(expected.ask_layout(server), 10)
    list(expected.watch(iter([("n", torch.zeros(1))])))
    with pytest.raises(BadAnswer, match="not the student's weights: n"):
        loop.run(expected.check(server), 10)
