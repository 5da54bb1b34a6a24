"""The backend of the loss is one for the whole run: what all ranks have, with the reason where it is a lesser one."""

import pytest

from megatron_opd.config import LossConfig, StudentConfig, TeacherConfig
from megatron_opd.loss.fused import native
from megatron_opd.trainer.loss_backend import LossBackend, _common

WHY = "there is no C++ compiler 'c++' (CXX names another one)"
TEACHERS = [TeacherConfig(name="t", model="m")]
needs_kernels = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler here")


def settled(parallel, loss, lacking, dtype="fp32", teachers=None):
    """(name, whether it has a hash, note) on a rank, or the error; the ranks `lacking` have no native kernels."""
    from unittest import mock

    from megatron_opd.loss.fused import native
    from megatron_opd.trainer.loss_backend import settle

    found = native.found() if parallel.rank not in lacking else WHY
    student = StudentConfig(model="m", dtype=dtype)
    with mock.patch.object(native, "found", return_value=found):
        try:
            made = settle(loss, student, TEACHERS if teachers is None else teachers, parallel)
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, str(error)
    return made.name, bool(made.kernels), made.note


@needs_kernels
@pytest.mark.parametrize(("lacking", "where"), [((), ""), ((0, 1), ""), ((1,), " (rank 1)"), ((0,), " (rank 0)")])
def test_all_ranks_take_what_all_of_them_have(ranks, lacking, where):
    lesser = ("torch", False, f"the native kernels are not there: {WHY}{where}")
    assert ranks.run(2, settled, LossConfig(), lacking) == [lesser if lacking else ("native", True, "")] * 2


@needs_kernels
def test_ranks_that_do_not_compute_the_loss_need_no_kernels(ranks):
    assert ranks.run(2, settled, LossConfig(), (0,), pipeline=2) == [("native", True, "")] * 2


@needs_kernels
def test_a_backend_that_is_named_and_lacking_ends_the_run(ranks):
    main, peer = ranks.run(2, settled, LossConfig(backend="native"), (1,))
    assert main[0] == "ValueError"
    assert peer[0] == "PeerError"
    assert f"loss.backend (rank 1): backend 'native' cannot be had (the native kernels are not there: {WHY})" in main[1]
    assert main[1] in peer[1]


@pytest.mark.parametrize(
    ("loss", "dtype", "expected"),
    [
        (LossConfig(backend="torch"), "fp32", ("torch", False, "")),
        (LossConfig(backend="readable"), "fp32", ("readable", False, "")),
        (LossConfig(), "fp16", ("torch", False, "")),
        (LossConfig(backend="torch"), "fp16", ("torch", False, "")),
        (LossConfig(kind="sampled"), "fp32", ("", False, "")),
    ],
)
def test_what_is_asked_for_or_first_choice_needs_no_note(ranks, loss, dtype, expected):
    assert ranks.run(1, settled, loss, (), dtype) == [expected]


@pytest.mark.parametrize("teachers", [[], [TeacherConfig(name="t", model="m", carrier="topk", backend="sglang")]])
def test_runs_without_hidden_states_have_no_backend(ranks, teachers):
    assert ranks.run(1, settled, LossConfig(), (), "fp32", teachers) == [("", False, "")]


def test_a_type_that_a_named_backend_does_not_take_is_refused(ranks):
    ((kind, said),) = ranks.run(1, settled, LossConfig(backend="native"), (), "fp16")
    assert kind == "ValueError"
    assert "backend 'native' cannot be had for torch.float16, torch.float32 on cpu" in said


def test_ranks_with_other_kernels_are_recorded_and_notes_name_their_ranks():
    one, other = LossBackend(name="native", kernels="aa"), LossBackend(name="native", kernels="bb", note="slow disk")
    assert _common({2: one, 3: other}) == LossBackend(name="native", kernels="aa, bb", note="slow disk (rank 3)")
    lesser = LossBackend(name="torch", note="why")
    assert _common({0: lesser, 1: one, 2: lesser}) == LossBackend(name="torch", note="why (ranks 0, 2)")
    with pytest.raises(ValueError, match=r"loss.backend \(rank 1\): there is none"):
        _common({0: one, 1: "there is none"})
