"""A save copies next to nothing, and weights that the optimizer shares with the model are in the files once."""

from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import steps
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB_SIZE = 90


class Made(TorchDispatchMode):
    """Counts the bytes of floating-point tensors that operations make; views make none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        is_new = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given
        if is_new and result.is_floating_point():
            self.bytes += result.untyped_storage().nbytes()
        return result


def states(student):
    """All weights and moments of a rank, flat."""
    parts = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    found = [p.detach().clone() for p in student.gpt.parameters()]
    for part in parts:
        for parameter in getattr(part, "model_param_gbuf_map", ()):
            made = part._get_main_param_and_optimizer_states(parameter)
            found += [made[name].detach().clone() for name in ("param", "exp_avg", "exp_avg_sq")]
    return found


def trained(parallel, config, rollouts, run_dir):
    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    for _ in range(2):
        student.step(batches, objective)
    return student, Checkpoints(run_dir, parallel, keep_last=1)


def equal(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def saved(parallel, config, rollouts, run_dir):
    """(bytes that a second save makes, parameters)."""
    student, checkpoints = trained(parallel, config, rollouts, run_dir)
    checkpoints.save(student, {"step": 1})
    with Made() as made:
        checkpoints.save(student, {"step": 2})
    return made.bytes, sum(p.numel() for p in student.gpt.parameters())


def loaded_by_megatron(parallel, config, rollouts, run_dir):
    """Whether Megatron's own loading, with its own form of the optimizer's state, brings the same."""
    from megatron.core import dist_checkpointing

    from megatron_opd.student import optimizer_state
    from megatron_opd.student.student import Student

    student, checkpoints = trained(parallel, config, rollouts, run_dir)
    path = checkpoints.save(student, {"step": 2})
    other = Student(config, parallel)
    with mock.patch.object(optimizer_state, "by_owners", return_value=nullcontext()):
        state = checkpoints._state(other, loading=True, with_rng=False)
    state = dist_checkpointing.load(state, str(path))
    other.gpt.load_state_dict(state["model"])
    other.optimizer.load_state_dict(state["optimizer"])
    return equal(states(student), states(other))


def older(parallel, config, rollouts, run_dir):
    """Whether a checkpoint with weights twice brings the same."""
    from megatron_opd.student import optimizer_state
    from megatron_opd.student.student import Student

    def with_weights(optimizer, parameter):
        found = optimizer._get_main_param_and_optimizer_states(parameter)
        return {name: found[name] for name in ("param", "exp_avg", "exp_avg_sq")}

    student, checkpoints = trained(parallel, config, rollouts, run_dir)
    with mock.patch.object(optimizer_state, "_states", with_weights):
        checkpoints.save(student, {"step": 2})
    other = Student(config, parallel)
    checkpoints.restore(other)
    return equal(states(student), states(other))


def config(root, family="qwen3", dtype="fp32", **optim):
    model = tiny.save(tiny.build(family), root / "model")
    return tiny.config(model, [{"name": "t", "model": model}], student={"dtype": dtype}, optim=optim)


@pytest.fixture(scope="module")
def rollouts():
    return tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)


def data_of(run_dir):
    """{key: places of its chunks in the files}."""
    from megatron_opd.models.torch_dist_dir import TorchDistDir

    (path,) = Path(run_dir).glob("checkpoints/step_*")
    found = TorchDistDir(path)
    places = {}
    for index, info in found._reader.storage_data.items():
        places.setdefault(index.fqn, set()).add((info.relative_path, info.offset, info.length))
    return {key: places[key] for key in found.tensors}


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 12), ("bf16", 14)])
def test_a_save_makes_no_copies_and_writes_weights_once(ranks, rollouts, tmp_path, dtype, size):
    ((made, count),) = ranks.run(1, saved, config(tmp_path, dtype=dtype), rollouts, str(tmp_path))
    assert made < count / 100
    places = data_of(tmp_path)
    data = sum(length for _, _, length in set.union(*places.values()))
    assert size * count <= data
    headers = 2048 * len(set.union(*places.values()))
    assert data <= size * count + headers


@pytest.mark.parametrize("layout", [{"data": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_fp32_weights_have_two_names_and_one_place(ranks, rollouts, tmp_path, layout):
    num_ranks = 2 * layout.get("pipeline", 1)
    ranks.run(num_ranks, saved, config(tmp_path, "qwen3_tied"), rollouts, str(tmp_path), **layout)
    places = data_of(tmp_path)
    prefix = "optimizer.state.param."
    second = [key for key in places if key.startswith(prefix)]
    assert len(second) == len([key for key in places if key.startswith("optimizer.state.exp_avg.")]) > 0
    for key in second:
        assert places[key] == places[key.removeprefix(prefix)]


@pytest.mark.parametrize(("dtype", "layout"), [("fp32", {"data": 2}), ("bf16", {"data": 2}), ("fp32", {"tensor": 2})])
def test_megatrons_own_loading_reads_it(ranks, rollouts, tmp_path, dtype, layout):
    made = config(tmp_path, dtype=dtype)
    assert ranks.run(2, loaded_by_megatron, made, rollouts, str(tmp_path), **layout) == [True, True]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_with_weights_twice_loads(ranks, rollouts, tmp_path, dtype):
    made = config(tmp_path, dtype=dtype)
    assert ranks.run(2, older, made, rollouts, str(tmp_path), data=2) == [True, True]


def test_tensors_are_fetched_when_it_is_their_turn():
    from megatron_opd.student import cpu

    cpu.enable()
    from megatron_opd.student import streamed

    fetched = []
    tensors = [(i, mock.Mock(cpu=lambda i=i: fetched.append(i))) for i in range(3)]
    for entry, _ in streamed._Fetched(tensors):
        assert fetched == list(range(entry + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_view_stands_alone_in_the_same_memory(dtype):
    from megatron_opd.student import cpu

    cpu.enable()
    from megatron_opd.student import streamed

    buffer = torch.arange(24).to(dtype)
    for view in (buffer[4:16].view(3, 4), buffer[5], buffer):
        alone = streamed._alone(view)
        assert alone.untyped_storage().size() == view.nbytes
        assert alone.shape == view.shape
        assert torch.equal(alone, view)
        assert alone.data_ptr() == view.data_ptr()
    for other in (buffer.view(4, 6).T, buffer[3:3]):  # which Megatron copies
        assert torch.equal(streamed._alone(other), other)
