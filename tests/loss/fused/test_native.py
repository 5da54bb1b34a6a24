"""The compiled kernels where their loops have edges: widths, orders of logits, kinds of matrices, instruction sets."""

import itertools

import cases
import pytest
import torch
from cases import Case

from megatron_opd.loss.fused import api, backends, compiled, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler here")
KINDS = [Case(beta, how, 2, 0.8) for beta in (0.0, 0.5, 1.0) for how in ("logits", "probs")]


def check(case, student, teachers, close=None):
    """Value and gradient of every token against the dense formula; `close`: absolute error allowed in the gradient."""
    weights = torch.linspace(1, 2, case.num_teachers).repeat(len(student), 1)
    weights /= weights.sum(-1, keepdim=True)
    mask = torch.ones(len(student), dtype=torch.bool)
    expected, _, gradient = cases.dense(case, student, teachers, weights, mask, size=student.shape[1])
    leaf = student.clone().requires_grad_()
    loss = api.distillation_loss(leaf * 1, teachers, weights=weights, backend="native", **case.settings)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=cases.LOSS_ERROR, abs=1e-7), case
    if close:
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=0, atol=close)
    else:
        assert cases.relative(leaf.grad, gradient) <= cases.allowed_error(gradient, student.dtype), case


def rows(width, count=3, scale=3.0, num_rows=3):
    generator = torch.Generator().manual_seed(width)
    return [scale * torch.randn(num_rows, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 511, 512, 513, 530, 1023, 1024, 1025, 1536, 2049, 4100])
def test_widths(width):
    for case in KINDS:
        student, *teachers = rows(width)
        check(case, student, teachers, close=1e-7 if width == 1 else None)


@pytest.mark.parametrize("order", ["rising", "falling", "late peaks", "apart", "a little each block", "teachers only"])
def test_orders(order):
    """Exponentials are relative to a large logit met before: here each block has a larger one, or the last by far.
    Logits of 150 are themselves known to 8e-6 only."""
    for case in KINDS:
        student, *teachers = rows(2600)
        if order in ("rising", "falling"):
            student, *teachers = [x.sort(-1, descending=order == "falling").values * 2 for x in (student, *teachers)]
        elif order == "late peaks":
            student[:, 2599] = 60.0
            teachers[0][:, 2570], teachers[1][:, 3] = 70.0, 50.0
        elif order == "a little each block":  # too little for another look
            for n, column in enumerate(range(300, 2600, 512)):
                student[:, column] = 12 + 0.3 * n
        elif order == "teachers only":
            for n, column in enumerate(range(300, 2600, 512)):
                teachers[0][:, column], teachers[1][:, column] = 12.0 + 20 * n, 12.0 + 15 * n
        else:  # between blocks more than exponentials hold
            for n, x in enumerate((student, *teachers)):
                x[:, 512 * n : 512 * (n + 1)] += 150.0 if n else 120.0
        check(case, student, teachers, close=5e-6)


@pytest.mark.parametrize("column", [5, 700, 2599])
@pytest.mark.parametrize("lead", [0.9, 10.0])
def test_a_student_that_is_certain(column, lead):
    """Its gradient is a small difference of large numbers. Before the certain token there is one nearly as likely
    (0.9: it stays the reference), or one that is far less likely but large too."""
    for case in KINDS:
        student, *teachers = rows(2600, scale=1.0)
        student[:, 2] = 30.0
        student[:, column] = 30.0 + lead
        check(case, student, teachers)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_know_of_each_other(threads, dtype):
    """A row's gradient may be made while the next one is read: it is, to the bit, what the row alone gets."""
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case, width in itertools.product(KINDS, (530, 1040, 1047)):
            student, *teachers = [x.to(dtype) for x in rows(width, num_rows=7)]
            student[2:4] *= 5  # rows of several scales, one of them left out
            mask = torch.tensor([1, 1, 1, 0, 1, 1, 1])
            together = gradient_of(case, student, teachers, mask)
            for n in range(7):
                alone = gradient_of(case, student[n : n + 1], [t[n : n + 1] for t in teachers], torch.ones(1))
                assert torch.equal(together[n], alone[0] * mask[n]), (case, width, n)
    finally:
        torch.set_num_threads(kept)


def gradient_of(case, student, teachers, mask):
    """Of the sum over tokens."""
    leaf = student.clone().requires_grad_()
    settings = case.settings | {"mask": mask, "reduction": "none", "backend": "native"}
    api.distillation_loss(leaf * 1, teachers, **settings).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("num_teachers", [1, 3, 5, 7])
@pytest.mark.parametrize("kinds", [("float32",), ("bfloat16",), ("bfloat16", "float32")])
def test_matrices_of_several_kinds(num_teachers, kinds):
    for case, width in itertools.product(KINDS, (1040, 1047)):
        case = Case(case.beta, case.ensemble, num_teachers, case.temperature)
        student, *teachers = rows(width, 1 + num_teachers)
        dtypes = itertools.cycle(getattr(torch, kind) for kind in kinds)
        check(case, student, [x.to(dtype) for x, dtype in zip(teachers, dtypes, strict=False)])


def test_student_in_bfloat16():
    for case, width in itertools.product(KINDS, (1040, 1047)):
        student, *teachers = rows(width)
        weights = torch.full((3, 2), 0.5)
        _, _, gradient = cases.dense(case, student.bfloat16(), teachers, weights, torch.ones(3).bool(), size=width)
        leaf = student.bfloat16().requires_grad_()
        api.distillation_loss(leaf * 1, teachers, backend="native", **case.settings).backward()
        assert cases.relative(leaf.grad, gradient) <= cases.allowed_error(gradient, torch.bfloat16)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 700, 1199])
@pytest.mark.parametrize("who", [0, 1])
def test_what_is_not_finite_is_found(what, column, who):
    """In any block. One of several teachers whose probabilities are averaged may rule a token out."""
    for case in KINDS:
        student, *teachers = all_rows = rows(1200)
        all_rows[who][1, column] = what
        if what == -float("inf") and who == 1 and case.ensemble == "probs":
            check(case, student, teachers)
            continue
        with pytest.raises(api.NonFiniteLogits, match=r"at token 1$"):
            api.distillation_loss(student, teachers, backend="native", **case.settings)


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_lesser_instruction_sets(monkeypatch, tmp_path, capability):
    """Vectors of 8 and of 4 values, built and run here."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has none of them")
    monkeypatch.setenv("MEGATRON_OPD_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    library = compiled.load().library
    monkeypatch.setattr(native, "library", lambda: library)
    assert backends.choose([torch.zeros(1)], "native")._library is library
    for case in KINDS:
        for width in (5, 1043):
            student, *teachers = rows(width)
            check(case, student, teachers)
