"""A real server on this process's GPU: what it gives back, and new weights by CUDA IPC into what it takes again."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from fp8_model import in_fp8

from megatron_opd.config import RolloutConfig, ServersConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.sglang import process, server_memory
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.weights import fp8_weights
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Ask, Draw

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
PYTHON = Path(__file__).resolve().parents[2] / ".venv-sglang/bin/python"
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
PART = 0.3
"""Of the GPU, which the server has while it samples."""


@pytest.fixture(params=["none", "fp8"])
def quantization(request):
    """`rollout.quantization`."""
    return request.param


@pytest.fixture
def server(tmp_path, quantization):
    """(client, its settings, the model that it serves)."""
    if not PYTHON.is_file():
        pytest.skip("SGLang is not installed (make sglang)")
    model = tiny.build("qwen3", **SIZES)  # in float32 for what it says; its weights are numbers of bf16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    tiny.save(copy.deepcopy(model).bfloat16(), tmp_path / "model")
    how = fp8_weights.arguments() if quantization == "fp8" else ()
    args = ["--mem-fraction-static", str(PART), *how]
    settings = ServersConfig(python=str(PYTHON), colocated=True, args=args, start_timeout_s=600.0)
    started = process.start(settings, tmp_path / "model", name="server", log_dir=tmp_path / "logs", context=128)
    loop = Loop()
    try:
        process.wait(started, settings, say=print)
        client = Client(started[0].url, settings, vocab_size=SIZES["vocab_size"], context=128)
        yield client, settings, model.cuda(), loop
        loop.run(client.close(), 10)
    finally:
        process.stop(started)
        loop.close()


def test_memory_is_free_while_the_student_trains_and_weights_arrive_after_it(server, quantization, tmp_path):
    client, settings, model, loop = server
    rollout = RolloutConfig(sync="tensor", sync_verify=True, servers=settings, quantization=quantization)
    sync = WeightPush(rollout, loop, model=tmp_path / "model", write=None, spool=tmp_path / "spool")
    draw = Draw(rid="r", ids=(5, 6, 7), max_new_tokens=4, temperature=0.0, top_p=1.0, top_k=0, stop_ids=())

    def push(version):
        weights = ((name, tensor.bfloat16()) for name, tensor in model.state_dict().items())
        assert sync.push([client], weights, version) == {}

    assert loop.run(server_memory.has_saver(client))
    push(1)
    before = loop.run(client.generate(draw))
    held, total = torch.cuda.mem_get_info()
    assert sync.release([client]) == {}
    freed = torch.cuda.mem_get_info()[0] - held
    assert freed > 0.8 * PART * total
    taken = torch.zeros(int(freed * 0.9), dtype=torch.uint8, device="cuda")  # as the student would
    del taken
    torch.cuda.empty_cache()
    push(2)  # sync_verify: checksums of what the server has are those of the model
    after = loop.run(client.generate(draw))
    assert (after.ids, set(after.versions)) == (before.ids, {2})
    if quantization == "fp8":
        check_logps(model, client, loop)
    sync.close()


def check_logps(model, client, loop):
    """The server's log-probabilities are nearer to the gate's emulation than to the model without FP8."""
    ids = torch.arange(7, 87)[None].cuda()

    @torch.no_grad()
    def logp_R(model):
        logp = model(input_ids=ids).logits[0, 4:-1].double().log_softmax(-1)
        return logp.gather(-1, ids[0, 5:, None]).squeeze(-1).cpu()

    ask = Ask(rid="ask", ids=tuple(ids[0].tolist()), first=5, carrier="sampled")
    found_R = loop.run(client.score(ask), 60).logp_R.double()
    emulated_R, plain_R = logp_R(in_fp8(model)), logp_R(model)
    assert (found_R - emulated_R).abs().mean() < (found_R - plain_R).abs().mean()
