"""Rollouts in FP8: a server that takes rounded weights, at tensor-parallel size 1 and 2.

Without a GPU its products are those of `cpu_stand_ins/plain_fp8.py`; names, shapes, the loading of values and scales
and their parts on two ranks are SGLang's own. All else is in float32, so that roundings fall alike.
"""

from contextlib import ExitStack

import pytest
import tiny
import torch
from conftest import log_probs, taken
from fp8_model import in_fp8

from megatron_opd.config import RolloutConfig
from megatron_opd.sglang.errors import Unfit
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Ask

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a model whose weights are numbers of bf16, its directory)."""
    made = tiny.build("qwen3", **SIZES)
    return made, tiny.save(made, tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture(scope="module")
def clients(model, serve, connect):
    with ExitStack() as stack:
        made = []
        for tensor in (1, 2):
            how = {"name": f"fp8-tp{tensor}", "tensor": tensor, "args": list(fp8_weights.arguments())}
            server, settings = stack.enter_context(serve(model[1], **how))
            made.append(connect(server.url, settings))
        yield made


@pytest.mark.parametrize("way", ["broadcast", "tensor"])
def test_rounded_weights_arrive_bit_for_bit_and_are_sampled_from(model, clients, loop, tmp_path, way):
    source, directory = model
    sync = WeightPush(
        RolloutConfig(sync=way, sync_verify=True, quantization="fp8"),
        loop, model=directory, write=lambda weights, out: None, spool=tmp_path,
    )  # fmt: skip
    ids = list(range(7, 87))
    for version in (1, 2):  # the second push loads where the first one has
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.copy_((parameter + 0.02 * torch.randn_like(parameter)).bfloat16())
        weights = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
        assert sync.push(clients, iter(weights.items()), version) == {}
        expected_R = taken(log_probs(in_fp8(source), ids, first=5), ids[5:])
        plain_R = taken(log_probs(source, ids, first=5), ids[5:])
        for client in clients:
            ask = Ask(rid=f"{way}{version}", ids=tuple(ids), first=5, carrier="sampled")
            found_R = loop.run(client.score(ask), 60).logp_R.double()
            error, to_plain = (found_R - expected_R).abs().mean(), (found_R - plain_R).abs().mean()
            assert error < to_plain / 10  # a value between two numbers of FP8 may fall to the other one
    sync.close()


def test_a_server_that_would_take_them_for_something_else_is_refused(model, clients, loop, tmp_path):
    rollout = RolloutConfig(sync="tensor")
    sync = WeightPush(rollout, loop, model=model[1], write=lambda weights, out: None, spool=tmp_path)
    with pytest.raises(Unfit, match="this server is quantised"):
        sync.push(clients, iter(model[0].state_dict().items()), 9)
