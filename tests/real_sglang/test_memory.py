"""Memory given back and taken again by a real server. Without a GPU nothing is freed, but all is asked, and what SGLang
does when it is asked wrongly is the same: which is why `sglang/server_memory.py` keeps track."""

import time

import pytest

from megatron_opd.config import RolloutConfig
from megatron_opd.sglang import server_memory
from megatron_opd.sglang.errors import Down
from megatron_opd.sglang.weights.sync import WeightPush
from megatron_opd.sglang.wire import Draw

RESUME = "/resume_memory_occupation"
DRAW = Draw(rid="r", ids=(5, 6, 7), max_new_tokens=3, temperature=0.0, top_p=1.0, top_k=0, stop_ids=())


def test_a_server_gives_memory_back_and_takes_it_but_ends_when_asked_wrongly(models, serve, connect, loop, tmp_path):
    model, directory = models["qwen3"]
    with serve(directory, name="colocated", colocated=True) as (server, settings):
        client = connect(server.url, settings)
        assert not loop.run(server_memory.has_saver(client))
        sync = WeightPush(
            RolloutConfig(sync="tensor", servers=settings), loop, model=directory, write=None, spool=tmp_path
        )

        def push(version):
            weights = ((name, tensor.detach()) for name, tensor in model.state_dict().items())
            assert sync.push([client], weights, version) == {}
            assert loop.run(client.model_info())["weight_version"] == str(version)

        push(1)
        before = loop.run(client.generate(DRAW))
        for _ in range(2):  # the second time it has nothing to give
            assert sync.release([client]) == {}
            assert loop.run(client.model_info())["weight_version"] == server_memory.RELEASED
        push(2)
        after = loop.run(client.generate(DRAW))
        assert (before.ids, before.versions, after.versions) == (after.ids, (1,) * 3, (2,) * 3)
        sync.close()
        with pytest.raises(Down):  # it has its weights
            loop.run(client.post(RESUME, {"tags": ["weights"]}, 30.0))
        deadline = time.monotonic() + 60
        while server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server.process.poll() is not None
