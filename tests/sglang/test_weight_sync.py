"""The parts of the weight sync that need no server: buckets, checksums, the expectation of a server's checksums."""

import asyncio
import json

import pytest
import torch

from megatron_opd.config import RolloutConfig, ServersConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.sglang.errors import BadAnswer
from megatron_opd.sglang.weights import hashes
from megatron_opd.sglang.weights.buckets import buckets
from megatron_opd.sglang.weights.expected import Expected
from megatron_opd.sglang.weights.group import BroadcastGroup, own_address
from megatron_opd.sglang.weights.transports import check_sync, way_of


@pytest.mark.parametrize(
    ("sync", "servers", "problem"),
    [
        ("pigeon", {}, "rollout.sync must be one of broadcast, tensor, disk, not 'pigeon'"),
        ("broadcast", {"colocated": True}, "rollout.sync: broadcast is not for rollout.servers.colocated, because NCCL"
         " takes a GPU into a group only once; choose tensor (servers on one machine) or disk"),
        ("broadcast", {"colocated": True, "urls": ["http://a:1"]}, "rollout.sync: broadcast is not for rollout"),
    ],
)  # fmt: skip
def test_a_way_that_does_not_reach_the_servers_is_refused(sync, servers, problem):
    rollout = RolloutConfig(engine="sglang", sync=sync, servers=ServersConfig(**servers))
    (found,) = check_sync(rollout)
    assert found.startswith(problem)
    with pytest.raises(ValueError, match=r"rollout\.sync"):
        way_of(rollout)


@pytest.mark.parametrize("sync", ["broadcast", "tensor", "disk"])
def test_every_way_reaches_servers_with_gpus_of_their_own(sync):
    assert check_sync(RolloutConfig(engine="sglang", sync=sync)) == []
    beside = RolloutConfig(engine="sglang", sync=sync, servers=ServersConfig(colocated=True))
    assert (check_sync(beside) == []) == (sync != "broadcast")


@pytest.mark.parametrize(("gpus", "odd"), [([4, 5, 6, 7], None), ([6, 7, 2, 3], None), ([4, 6, 5, 7], [4, 6])])
def test_a_server_that_gets_handles_has_gpus_in_a_row(gpus, odd):
    servers = ServersConfig(count=2, tensor=2, gpus=gpus)
    found = check_sync(RolloutConfig(engine="sglang", sync="tensor", servers=servers))
    assert found == ([] if odd is None else [
        f"rollout.servers.gpus: with rollout.sync: tensor the 2 GPUs of a server must be numbers in a row, not {odd};"
        " write others, or choose rollout.sync: broadcast or disk"
    ])  # fmt: skip
    assert check_sync(RolloutConfig(engine="sglang", sync="broadcast", servers=servers)) == []


def test_buckets_are_bounded_in_order_and_whole():
    torch.manual_seed(0)
    weights = [(f"w{i}", torch.randn(3, 5)) for i in range(5)] + [("large", torch.randn(40))]
    weights += [(f"b{i}", torch.randn(7).bfloat16()) for i in range(2)]
    made = list(buckets(iter(weights), 125))
    assert [bucket.names for bucket in made] == [["w0", "w1"], ["w2", "w3"], ["w4"], ["large"], ["b0", "b1"]]
    assert [bucket.dtype for bucket in made] == ["float32"] * 4 + ["bfloat16"]
    for (name, tensor), (other, again) in zip(weights, [p for b in made for p in b.tensors()], strict=True):
        assert name == other
        assert torch.equal(tensor, again)


def gpu_hash_by_the_word(data):
    """SGLang's kernel, one 32-bit word after the other."""

    def rotated(x, r):
        return ((x << r) | (x >> (32 - r))) & 0xFFFFFFFF

    def mixed(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return x ^ (x >> 16)

    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    seed, total = 0x243F6A88, 0
    seeds = (seed, ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
    for start in range(0, len(words), 8192):
        halves = []
        for which, factor, turn in ((0, 0x27D4EB2D, 15), (1, 0x165667B1, 13)):
            h = 0
            for i in range(start, min(start + 8192, len(words))):
                h += mixed(words[i] ^ ((i * factor + seeds[which]) & 0xFFFFFFFF) ^ rotated(i, turn))
            halves.append(mixed((h & 0xFFFFFFFF) ^ (4 * len(words))))
        total = (total + (halves[0] << 32 | halves[1])) & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = ((total ^ (total >> shift)) * factor) & (1 << 64) - 1
    return f"{total ^ (total >> 31):016x}"


@pytest.mark.parametrize(
    ("count", "dtype"), [(1, "bfloat16"), (77, "float32"), (20_001, "bfloat16"), (140_001, "bfloat16")]
)
def test_the_gpu_checksum_is_that_of_the_kernels_text(count, dtype):
    torch.manual_seed(count)
    tensor = torch.randn(count).to(getattr(torch, dtype))
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert hashes.on_gpu(tensor) == gpu_hash_by_the_word(data)


class Server:
    """What Expected asks a client, with the layout and the weights of a server."""

    url = "http://server"

    def __init__(self, ranks, sums, **info):
        self.ranks, self.sums, self.info = ranks, sums, info

    async def server_info(self):
        return {"tp_size": self.ranks, "dtype": "float32", "device": "cpu", **self.info}

    async def checksums(self):
        return {"ranks": [{"checksums": s, "parallelism_info": [{"tp_rank": r}]} for r, s in enumerate(self.sums)]}


def test_heads_shared_by_ranks_and_a_padded_vocabulary(tmp_path):
    """4 ranks of a model with 2 key-value heads: what real servers here, with fewer ranks, do not show."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    torch.manual_seed(0)
    q, k, v, embed = torch.randn(12, 5), torch.randn(6, 5), torch.randn(6, 5), torch.randn(70, 5)
    attention = "model.layers.0.self_attn."
    weights = {f"{attention}{n}_proj.weight": t for n, t in (("k", k), ("q", q), ("v", v))}
    padded = torch.cat([embed, torch.zeros(58, 5)])
    sums = [
        {
            f"{attention}qkv_proj.weight": hashes.on_cpu(
                torch.cat([q[3 * r :][:3], k[3 * (r // 2) :][:3], v[3 * (r // 2) :][:3]])
            ),
            "model.embed_tokens.weight": hashes.on_cpu(padded[32 * r :][:32]),
        }
        for r in range(4)
    ]
    server, loop = Server(4, sums), Loop()
    expected = Expected(tmp_path)
    loop.run(expected.ask_layout(server))
    list(expected.watch(iter({**weights, "model.embed_tokens.weight": embed}.items())))
    loop.run(expected.check(server))
    sums[3]["model.embed_tokens.weight"] = "0" * 16
    with pytest.raises(BadAnswer, match=r"model\.embed_tokens\.weight$"):
        loop.run(expected.check(server))
    loop.close()


def test_a_part_that_never_comes_is_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    name = "model.layers.0.mlp.gate_up_proj.weight"
    server, loop = Server(1, [{name: "0" * 16}]), Loop()
    expected = Expected(tmp_path)
    loop.run(expected.ask_layout(server))
    list(expected.watch(iter([("model.layers.0.mlp.gate_proj.weight", torch.zeros(2, 2)), ("n", torch.zeros(1))])))
    with pytest.raises(BadAnswer, match=r"gate_up_proj\.weight, n"):
        loop.run(expected.check(server))
    loop.close()


def test_a_group_that_is_dropped_while_it_waits_ends_with_an_error_at_once():
    loop = Loop()

    async def wait_in_vain():
        group = BroadcastGroup(2, ["http://127.0.0.1:1"], timeout_s=60)
        joining = loop.start(group.join())
        await asyncio.sleep(0.3)
        assert not joining.done()
        group.let_go()
        return joining

    with pytest.raises(RuntimeError):
        loop.run(wait_in_vain()).result(120)
    loop.close()


def test_servers_on_this_machine_are_reached_by_loopback():
    assert own_address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
