"""The Triton kernels in the interpreter against the dense float64 formula: all losses, and rows of all alignments."""

from dataclasses import replace
from itertools import product

import cases
import pytest
import torch
from cases import LOSS_ERROR, Case

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import api, backends, exchange
from megatron_opd.loss.fused.chunks import Problem, room_of_row, run
from megatron_opd.loss.fused.reference import Reference
from megatron_opd.loss.fused.statistics import NOTHING, LogitRows, LossSpec, centers

pytestmark = [pytest.mark.kernels, pytest.mark.slow]
LANES = 4
"""Of a program; a tile is then 32 or 64 columns, and a row several."""
BETAS, TEMPERATURES = (0.0, 0.3, 1.0), (0.5, 2.0)
LOSSES = [(beta, "logits", n) for beta, n in product(BETAS, (1, 2, 4))]
LOSSES += [(beta, "probs", n) for beta, n in product(BETAS, (2, 4))]
WIDTHS = [(150, 131), (136, 136), (64, 64), (67, 67), (40, 9), (300, 129)]
"""Columns and real ones: rows that begin at 16 bytes or do not, a last tile that is full, nearly empty, or the only."""


@pytest.fixture(autouse=True)
def triton_rows(monkeypatch):
    pytest.importorskip("triton")
    from megatron_opd.loss.fused import triton_rows

    monkeypatch.setattr(triton_rows, "_LANES", LANES)
    return triton_rows


def check(case, columns, size):
    student, teachers, weights, mask = cases.logits(case, columns=columns, size=size)
    expected, _, gradient = cases.dense(case, student, teachers, weights, mask, size=size)
    leaf = student.clone().requires_grad_()
    settings = {"weights": weights, "mask": mask, "vocab": VocabShard(0, columns, size), **case.settings}
    loss = api.distillation_loss(leaf * 1, teachers, backend="triton", **settings)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_ERROR), case
    assert cases.relative(leaf.grad, gradient) <= cases.allowed_error(gradient, case.dtype, "triton"), case
    assert (leaf.grad[3] == 0).all()
    assert (leaf.grad[:, size:] == 0).all()


@pytest.mark.parametrize(("beta", "ensemble", "teachers"), LOSSES)
def test_every_loss(beta, ensemble, teachers):
    for temperature in TEMPERATURES:
        check(Case(beta, ensemble, teachers, temperature), *WIDTHS[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "size"), WIDTHS)
def test_every_alignment(columns, size, dtype):
    for beta, ensemble, teachers in ((1.0, "logits", 1), (0.3, "probs", 2)):
        check(Case(beta, ensemble, teachers, 1.0, dtype), columns, size)


@pytest.mark.parametrize("offset", [0, 3])
def test_rows_that_begin_anywhere(offset):
    """Parts of larger matrices, which begin alike or each at another place."""
    case = Case(0.3, "logits", 2, 1.0)
    student, teachers, weights, _ = cases.logits(case, columns=131, size=131)
    weights[2] = 0.5
    teachers = [t.nan_to_num(0.0) for t in teachers]
    results = []
    for backend in (Reference(), backends._triton()):
        models = [part_of(x, 5 + offset * n) for n, x in enumerate((student, *teachers))]
        scale = torch.ones(len(student), dtype=torch.float64)
        spec = LossSpec(0.3, 1.0, "logits", 2, by_teacher=True)
        problem = Problem(models[0], tuple(models[1:]), weights.float(), spec, VocabShard(0, 131, 131), backend)
        results.append((run(replace(problem, scale_R=scale)).outcome, models[0]))
    (expected, gradient), (found, its) = results
    torch.testing.assert_close(found.loss_R, expected.loss_R, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.teachers_RN, expected.teachers_RN, rtol=1e-5, atol=2e-6)
    assert cases.relative(its, gradient) <= 2e-6


def part_of(x, begin):
    """`x` in the columns from `begin` of a wider matrix, whose other values are not to be read."""
    wide = torch.full((len(x), 160), float("nan"))
    wide[:, begin : begin + x.shape[1]] = x
    return wide[:, begin : begin + x.shape[1]]


@pytest.mark.parametrize(("ensemble", "teachers", "beta"), [("logits", 1, 1.0), ("logits", 4, 0.3), ("probs", 4, 0.3)])
def test_statistics(ensemble, teachers, beta):
    """Those of each teacher and at another sampling temperature too, and of a shard without columns."""
    case = Case(beta, ensemble, teachers, 0.8)
    student, models, weights, _ = cases.logits(case, columns=150, size=131)
    models = [m.nan_to_num(0.0) for m in models]
    spec = LossSpec(beta, 0.8, ensemble, teachers, by_teacher=True, sampling_temperature=1.3)
    for width in (131, 0):
        rows = LogitRows(student, tuple(models), weights.float().contiguous(), width)
        found, expected = backends._triton().stats(rows, spec), Reference().stats(rows, spec)
        if width == 0:
            assert (found[:, 1] == 0).all()
            assert found.isfinite().all()
        else:
            is_nothing = expected == NOTHING  # a teacher without weight
            assert (found[is_nothing] < NOTHING / 10).all()
            torch.testing.assert_close(found[~is_nothing], expected[~is_nothing], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(("beta", "ensemble", "teachers"), LOSSES[1::2])
def test_shards(beta, ensemble, teachers):
    """Two shards' statistics and sums, put together as ranks do, and their gradients."""
    student, models, weights, _ = cases.logits(Case(beta, ensemble, teachers, 0.8), columns=131, size=131)
    models = [m.nan_to_num(0.0) for m in models]
    spec, scale = LossSpec(beta, 0.8, ensemble, teachers, by_teacher=True), torch.ones(len(student)).double()
    whole, parts = rows_of(student, models, weights, 0, 131), [(0, 75), (75, 131)]
    expected, sums = Reference().whole(whole, spec, scale)
    shards = [rows_of(student, models, weights, *part) for part in parts]
    backend = backends._triton()
    merged = exchange.merged(torch.stack([backend.stats(shard, spec) for shard in shards]), spec)
    torch.testing.assert_close(merged[weights.all(-1)], expected[weights.all(-1)], rtol=2e-6, atol=1e-5)
    found = sum(backend.sums(shard, spec, merged) for shard in shards) if spec.has_sums else None
    if found is not None:
        torch.testing.assert_close(found[:, :2], sums[:, :2], rtol=1e-5, atol=1e-6)
    for shard in shards:
        backend.gradient(shard, spec, merged, (centers(merged, found), scale))
    assert cases.relative(torch.cat([shard.student_RL for shard in shards], dim=1), whole.student_RL) <= 2e-6


def rows_of(student, models, weights, start, stop):
    columns = slice(start, stop)
    teachers = tuple(m[:, columns].clone() for m in models)
    return LogitRows(student[:, columns].clone(), teachers, weights.float().contiguous(), stop - start)


def test_rows_of_chunks_begin_at_16_bytes_on_a_gpu():
    assert [room_of_row(columns, "cuda") for columns in (50_257, 151_936)] == [50_272, 151_936]
    assert room_of_row(50_257, "cpu") == 50_257


@pytest.mark.parametrize("by_row", [False, True])
def test_a_gradient_times_a_factor(by_row):
    backend = backends._triton()
    for x in (torch.randn(5, 131), torch.randn(5, 200)[:, 3:134], torch.randn(3, 9000)):
        factor = torch.linspace(0, 2, len(x)) if by_row else torch.tensor(1.5)
        expected = x * (factor[:, None] if by_row else factor)
        torch.testing.assert_close(backend.scale(x, factor), expected)
