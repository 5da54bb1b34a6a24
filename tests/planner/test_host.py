"""Host memory in the plan, on GPUs and without, and what of it is somebody else's number."""

import dataclasses
import gzip

import pytest
import tiny

from megatron_opd import config
from megatron_opd.planner import host, memory, sizes
from megatron_opd.planner.job import build

MODEL = {"vocab_size": 2048, "num_hidden_layers": 4, "intermediate_size": 128, "hidden_size": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tiny.build("llama", **MODEL), tmp_path_factory.mktemp("models") / "student")


def job(model, teacher=None, **settings):
    settings = {"train": {"steps": 10, "micro_batch_size": 4}, "rollout": {"prompts_per_step": 16}, **settings}
    return build(tiny.config(model, [{"name": "t", "model": model, **(teacher or {})}], **settings), gpu="H100")


def test_without_gpus_a_rank_has_all_that_a_gpu_would(model):
    made = job(model)
    found = host.machine(made, on_gpu=False).rank
    on_chip = memory.trainer(dataclasses.replace(made, on_gpu=False))[0]
    assert found.always.items() >= on_chip.always.items()
    assert found.moments.items() >= on_chip.moments.items()
    assert found.total == pytest.approx(on_chip.total + made.assumed.process + found.always["prompts"])


def test_with_gpus_models_are_elsewhere(model):
    made = job(model)
    found = host.machine(made, on_gpu=True).rank
    assert found.always == {"programs": 3e9, "prompts": found.always["prompts"], "teachers that wait": 0}
    assert found.moments["the start"] == {"engine weights": 4 * sizes.numel(sizes.whole(made.student))}


def test_teachers_that_wait_are_in_host_memory(model):
    made = job(model, {"offload": True, "dtype": "bf16"})
    head = MODEL["vocab_size"] * MODEL["hidden_size"]
    waiting = host.machine(made, on_gpu=True).rank.always["teachers that wait"]
    assert waiting == 2 * (sizes.numel(sizes.whole(made.student)) - head)


def test_prompts_are_twice_their_files(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 100)
    made = job(model)
    source = dataclasses.replace(made.config.data.train[0], path=str(path))
    hub = dataclasses.replace(source, name="hub", path="hf:some/set")
    data = dataclasses.replace(made.config.data, train=[source, hub], eval=[])
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, data=data))
    assert host.machine(made, on_gpu=True).rank.always["prompts"] == 2 * path.stat().st_size
    size, path = path.stat().st_size, path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress((tmp_path / "prompts.jsonl").read_bytes()))
    assert path.stat().st_size < size / 2
    made.config.data.train[0] = dataclasses.replace(made.config.data.train[0], path=str(path))
    assert host.machine(made, on_gpu=True).rank.always["prompts"] == 2 * size


def test_one_engine_a_replica(model):
    one = host.machine(job(model, parallel={"tensor": 1}), on_gpu=False)
    two = host.machine(job(model, parallel={"tensor": 2, "data": 2}), on_gpu=False)
    assert (one.ranks_here, two.ranks_here) == (1, 4)
    assert one.trainer == one.rank.total
    assert two.rank.total < two.trainer / 2 <= two.rank.total * 2
    assert two.total == two.trainer + sum(two.others.values())


def test_ranks_with_gpus_are_spread_over_machines(model):
    made = job(model, parallel={"data": 16})
    whole, halves = (host.machine(made, on_gpu=on_gpu) for on_gpu in (False, True))
    assert (whole.ranks_here, halves.ranks_here) == (16, 8)
    assert halves.trainer == pytest.approx(8 * halves.rank.total)


def test_parameters_are_put_together_only_where_ranks_have_parts(model):
    for parallel, optim, bytes_each in [
        ({"data": 2}, {}, 16),
        ({"data": 1}, {}, 0),
        ({"data": 2}, {"distributed": False}, 0),
    ]:
        made = job(model, parallel=parallel, optim=optim)
        largest = MODEL["vocab_size"] * MODEL["hidden_size"]
        save = host.machine(made, on_gpu=False).rank.moments["a save"]
        assert save["parameters put together"] == bytes_each * largest


def test_numbers_of_other_rooms():
    from megatron_opd.rollout import decoding, reading
    from megatron_opd.student import cpu

    cpu.enable()
    from megatron_opd.student import weights

    assert (memory.ENGINE_ROWS, memory.ENGINE_CACHE) == (decoding.MAX_ROWS, decoding.CACHE_BYTES)
    assert memory._ENGINE_TOKENS == reading.BEGIN_TOKENS
    assert weights.BUCKET_BYTES == host.EXPORT_BUCKET


def test_the_engine_takes_fewer_sequences_when_their_cache_is_full(model):
    made = job(model, rollout={"prompts_per_step": 128, "max_new_tokens": 512})
    a_sequence = made.longest * memory.cache_bytes(made.student, 4, 1)
    assert memory.engine_rows(made) == 128 <= memory.ENGINE_CACHE // a_sequence
    longer = job(model, rollout={"prompts_per_step": 128, "max_new_tokens": 2**16})
    a_sequence = longer.longest * memory.cache_bytes(longer.student, 4, 1)
    assert memory.engine_rows(longer) == memory.ENGINE_CACHE // a_sequence < 128


def test_each_episode_may_have_a_session_of_python(model):
    def planned(*tools):
        made = job(model, rollout={"prompts_per_step": 6, "samples_per_prompt": 2})
        environment = config.EnvironmentConfig(name="tools", tools=list(tools))
        data = config.DataConfig(train=[config.SourceConfig(name="a", path="")])
        made = dataclasses.replace(made, config=dataclasses.replace(made.config, environment=environment, data=data))
        return host.machine(made, on_gpu=False).others

    assert planned("calculator", "python")["sessions"] == 12 * 16e6
    assert "sessions" not in planned("calculator")
