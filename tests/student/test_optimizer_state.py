"""The distributed optimizer's state in checkpoints: ranks write and read their shares, and layouts do not matter."""

import math
import re

import pytest
import steps
import tiny
import torch

from megatron_opd.student import optimizer_state
from megatron_opd.student.optimizer_state import Piece

VOCAB_SIZE = 90
STATES = ("param", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_pieces_are_what_ranks_have(num_ranks):
    bucket = range(60, 60 + 30 * num_ranks)
    share = len(bucket) // num_ranks
    holder = {element: number // share for number, element in enumerate(bucket)}
    for start in range(bucket.start, bucket.stop, 7):
        for stop in range(start + 1, bucket.stop + 1, 11):
            found = optimizer_state.pieces(range(start, stop), bucket, num_ranks)
            told = [(piece.rank, element) for piece in found for element in range(piece.start, piece.end)]
            assert told == [(holder[start + element], element) for element in range(stop - start)]
            assert [piece.rank for piece in found] == sorted({piece.rank for piece in found})


def test_the_owner_has_most():
    assert optimizer_state.owner([Piece(3, 0, 5), Piece(4, 5, 14), Piece(5, 14, 20)]) == 4
    assert optimizer_state.owner([Piece(1, 0, 5), Piece(2, 5, 10)]) == 1


def states(student, parallel):
    """{name of the parameter in the whole model: {state: (first element, values)}} of this rank."""
    names = {parameter: name for name, parameter in student.gpt.named_parameters()}
    first = parallel.pipeline_rank * student.arch.num_layers // parallel.pipeline_size
    expert = parallel.expert_rank * (student.arch.num_experts or 0) // parallel.expert_size
    found = {}
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for parameter, at in part.model_param_gbuf_map.items():
            start = part.gbuf_ranges[at[0]][at[1]][at[2]]["param_map"][parameter]["param"].start
            made = part._get_main_param_and_optimizer_states(parameter)
            name = re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) + first), names[parameter])
            name = re.sub(r"(?<=experts\.)\d+", lambda number: str(int(number[0]) + expert), name)
            if name == "output_layer.weight" and student.arch.tied_embeddings:
                continue  # the last stage's copy of the embedding
            found[name] = {state: (start, made[state].detach().clone()) for state in STATES}
    return found


def saved(parallel, config, rollouts, run_dir):
    """The state after two steps, and how many bytes of it this rank is to write."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    for _ in range(2):
        student.step(pack(rollouts), objective)
    checkpoints = Checkpoints(run_dir, parallel, keep_last=1)
    made = checkpoints._state(student, loading=False, with_rng=False)["optimizer"]
    tensors = [leaf.data for leaf in nested_values(made) if hasattr(leaf, "replica_id")]
    checkpoints.save(student, {"step": 2})
    return states(student, parallel), sum(tensor.nbytes for tensor in tensors)


def restored(parallel, config, run_dir):
    """The state that a new student gets, and how many bytes a rank makes room for besides the optimizer's own."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_opd.student.checkpoint import Checkpoints
    from megatron_opd.student.student import Student

    student = Student(config, parallel)
    checkpoints = Checkpoints(run_dir, parallel, keep_last=1)
    checkpoints.restore(student)
    made = checkpoints._state(student, loading=True, with_rng=False)["optimizer"]
    tensors = [leaf.data for leaf in nested_values(made) if hasattr(leaf, "replica_id")]
    parts = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    own = {
        state.untyped_storage().data_ptr()
        for part in parts
        for parameter in part.model_param_gbuf_map
        for state in part._get_main_param_and_optimizer_states(parameter).values()
    }
    room = sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().data_ptr() not in own)
    return states(student, parallel), room


def whole(answers):
    """{name: {state: flat tensor}}, of what all ranks have."""
    found = {}
    for answer, _ in answers:
        for name, made in answer.items():
            for state, (start, values) in made.items():
                found.setdefault((name, state), {})[start] = values
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}


@pytest.fixture(scope="module")
def rollouts():
    return tiny.rollouts(count=6, vocab_size=VOCAB_SIZE)


def size(layout):
    return math.prod(layout.get(name, 1) for name in ("data", "pipeline"))


def saved_models(family, root):
    return [tiny.save(tiny.build(family, seed=seed), root / str(seed)) for seed in range(2)]


def config(model, teacher, dtype="fp32"):
    return tiny.config(model, [{"name": "t", "model": teacher}], student={"dtype": dtype})


@pytest.mark.parametrize(
    ("family", "first", "others"),
    [
        ("qwen3", {"data": 3}, [{"data": 1}, {"data": 2}]),
        ("qwen3", {"data": 1}, [{"data": 3}]),
        ("qwen3_tied", {"pipeline": 2}, [{"data": 2}]),  # two buckets, for the embedding that both stages have
        ("qwen3_tied", {"data": 2}, [{"pipeline": 2}]),
        ("qwen3_moe", {"data": 4, "expert": 2}, [{"data": 2, "expert": 2}]),  # two optimizers in one
    ],
    ids=str,
)
def test_any_layout_has_the_state_that_another_saved(ranks, rollouts, tmp_path, family, first, others):
    made = config(*saved_models(family, tmp_path))
    expected = whole(ranks.run(size(first), saved, made, rollouts, str(tmp_path), **first))
    for layout in others:
        found = whole(ranks.run(size(layout), restored, made, str(tmp_path), **layout))
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (name, layout)


def test_each_rank_writes_its_share_and_reads_into_what_it_has(ranks, rollouts, tmp_path):
    made = config(*saved_models("qwen3", tmp_path), dtype="bf16")
    answers = ranks.run(3, saved, made, rollouts, str(tmp_path), data=3)
    total = 12 * sum(values.numel() for (_, state), values in whole(answers).items() if state == "param")
    written = [count for _, count in answers]
    assert sum(written) == total
    assert max(written) < total / 2  # all of it, if one rank or every rank wrote
    writers = {path.name.split("_")[2] for path in (tmp_path / "checkpoints/step_00000002").glob("__*.distcp")}
    assert writers == {"0", "1", "2"}
    largest = 12 * max(values.numel() for values in whole(answers).values())
    for _, room in ranks.run(3, restored, made, str(tmp_path), data=3):
        assert room <= 2 * largest  # of the parameters at the two ends of its share
