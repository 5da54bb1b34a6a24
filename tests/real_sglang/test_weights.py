"""Weights from here to real servers, at tensor-parallel size 1 and 2 at the same time: all three ways, bit for bit."""

import asyncio
import copy
import dataclasses
import shutil
import threading
from contextlib import ExitStack

import pytest
import torch
from conftest import log_probs, taken
from safetensors.torch import load_file, save_file

from megatron_opd.config import RolloutConfig
from megatron_opd.sglang.errors import BadAnswer, Down
from megatron_opd.sglang.weights import stream as stream_module
from megatron_opd.sglang.weights.expected import Expected
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Ask, Draw

FAMILY = "qwen3_moe"  # has every kind of tensor that a server fuses
SMALL = 9000
"""Bytes of a bucket, so that even these models take many."""


@pytest.fixture(scope="module")
def clients(models, serve, connect):
    """A server with one rank and one with two."""
    with ExitStack() as stack:
        made = []
        for tensor in (1, 2):
            server, settings = stack.enter_context(serve(models[FAMILY][1], name=f"tp{tensor}", tensor=tensor))
            made.append(connect(server.url, settings))
        yield made


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(stream_module, "buckets", lambda weights: buckets(weights, SMALL))


buckets = stream_module.buckets


@pytest.fixture
def make_sync(models, loop, tmp_path):
    made = []

    def make(way, **changes):
        directory = models[FAMILY][1]

        def write(weights, out):
            out.mkdir(parents=True)
            save_file(dict(weights), out / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(f"{directory}/config.json", out)

        rollout = RolloutConfig(sync=way, **{"sync_verify": True, **changes})
        made.append(WeightPush(rollout, loop, model=directory, write=write, spool=tmp_path / "spool"))
        return made[-1]

    yield make
    for sync in made:
        sync.close()


def changed(model, seed):
    """The model with noise on its weights."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


def named(model, directory):
    """As the student's export gives them."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def logps(loop, client, ids, first=5):
    return loop.run(client.score(Ask(rid="check", ids=tuple(ids), first=first, carrier="sampled")), 60).logp_R


@pytest.mark.parametrize("way", ["broadcast", "tensor", "disk"])
def test_every_way_brings_the_weights_bit_for_bit(models, clients, make_sync, loop, tmp_path, way):
    sync = make_sync(way)
    ids = list(range(7, 47))
    for version in (1, 2):  # the second push uses what the first one set up
        model = changed(models[FAMILY][0], seed=version)
        weights = named(model, tmp_path / f"hf{version}")
        assert sync.push(clients, iter(weights.items()), version) == {}  # sync_verify compares every checksum
        expected_R = taken(log_probs(model, ids, first=5), ids[5:])
        for client in clients:
            assert loop.run(client.model_info(), 30)["weight_version"] == str(version)
            torch.testing.assert_close(logps(loop, client, ids).double(), expected_R, atol=1e-5, rtol=0)
            loop.run(sync.give(client), 30)
    if way == "disk":
        assert [path.name for path in (tmp_path / "spool").iterdir()] == ["v2"]


def test_a_single_changed_number_is_found(models, clients, loop, make_sync, tmp_path):
    weights = named(changed(models[FAMILY][0], seed=5), tmp_path / "hf")
    assert make_sync("tensor").push(clients, iter(weights.items()), 5) == {}
    for name in (
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "lm_head.weight",
    ):
        other = {n: t.clone() for n, t in weights.items()}
        other[name].view(-1)[-1] += 1e-6
        for client in clients:
            expected = Expected(models[FAMILY][1])
            loop.run(expected.ask_layout(client), 30)
            list(expected.watch(iter(other.items())))
            with pytest.raises(BadAnswer, match="not the student's weights: "):
                loop.run(expected.check(client), 30)


def test_new_weights_in_the_middle_of_an_answer(models, clients, loop, make_sync, tmp_path):
    """The tokens before carry the old version and its log-probabilities, the ones after the new ones."""
    sync = make_sync("broadcast")
    old, new = (changed(models[FAMILY][0], seed=seed) for seed in (10, 11))
    assert sync.push(clients, iter(named(old, tmp_path / "old").items()), 10) == {}
    draw = Draw(rid="long", ids=(9, 8, 7), max_new_tokens=290, temperature=1.0, banned_ids=(2,))
    is_over = threading.Event()

    async def answer_on(client):
        """One answer after the other: however long an update takes here, it meets one of them."""
        drawn = []
        while not is_over.is_set():
            drawn.append(await client.generate(dataclasses.replace(draw, rid=f"long {len(drawn)}")))
        return drawn

    futures = [loop.start(answer_on(client)) for client in clients]
    loop.run(asyncio.sleep(0.2))
    assert sync.push(clients, iter(named(new, tmp_path / "new").items()), 11) == {}
    is_over.set()
    answers = [drawn for future in futures for drawn in future.result(300)]
    both = [drawn for drawn in answers if sorted(set(drawn.versions)) == [10, 11]]
    assert both
    for drawn in both:
        assert list(drawn.versions) == sorted(drawn.versions)
        cut = drawn.versions.index(11)
        ids = draw.ids + drawn.ids
        for model, part in ((old, slice(0, cut)), (new, slice(cut, None))):
            # The banned token is out of the sampler's distribution.
            logp_RV = log_probs(model, ids, first=3)[part]
            logp_RV[:, 2] = -torch.inf
            expected_R = taken(logp_RV.log_softmax(-1), drawn.ids[part])
            torch.testing.assert_close(torch.tensor(drawn.logps[part]).double(), expected_R, atol=1e-5, rtol=0)


def test_an_aborted_answer_keeps_its_tokens(clients, loop):
    client = clients[0]
    draw = Draw(rid="to-abort", ids=(9, 8, 7), max_new_tokens=290, temperature=1.0, banned_ids=(2,))
    future = loop.start(client.generate(draw))
    loop.run(asyncio.sleep(0.2))
    loop.run(client.pause("abort"), 30)
    drawn = future.result(30)
    assert drawn.finish == "abort"
    assert 0 < len(drawn.ids) < 290
    assert len(drawn.logps) == len(drawn.versions) == len(drawn.ids)
    waiting = loop.start(client.generate(Draw(rid="waits", ids=(5,), max_new_tokens=2, temperature=1.0)))
    loop.run(asyncio.sleep(0.5))
    assert not waiting.done()
    loop.run(client.resume(), 30)
    assert len(waiting.result(30).ids) > 0


def test_a_session_left_open_is_no_obstacle(models, clients, loop, make_sync, tmp_path):
    for client in clients:
        loop.run(client.begin_weight_update(), 30)
    weights = named(changed(models[FAMILY][0], seed=20), tmp_path / "hf")
    assert make_sync("broadcast").push(clients, iter(weights.items()), 20) == {}


def test_weights_of_another_shape_fail_without_hanging(models, clients, make_sync, tmp_path):
    weights = named(changed(models[FAMILY][0], seed=21), tmp_path / "hf")
    wrong = {n: t[:-1] if n == "model.norm.weight" else t for n, t in weights.items()}
    consumed = []

    def stream():
        for pair in wrong.items():
            yield pair
            consumed.append(pair[0])

    sync = make_sync("broadcast", sync_verify=False)
    with pytest.raises(Down, match="no server has taken the weights"):
        sync.push(clients, stream(), 21)
    assert consumed == list(wrong), "the stream is a collective and must be run to its end"
    assert sync.push(clients, iter(weights.items()), 22) == {}
