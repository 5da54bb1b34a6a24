"""Both forms of the loss on one rank, by every backend: value and gradient against the dense float64 formula."""

import cases
import oracle
import pytest
import torch
from cases import COLUMNS, GRADIENT_ERROR, LOSS_ERROR, SIZE, Case

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import api, backends, chunks, native

VOCAB = VocabShard(0, COLUMNS, SIZE)


def available(name):
    if name == "native":
        return native.library() is not None
    return name in ("torch", "readable") or not isinstance(backends._triton(), str)


@pytest.fixture(params=["torch", "native", "triton", "readable"])
def backend(request, recwarn):
    if not available(request.param):
        pytest.skip(f"there is no {request.param} here")
    return request.param


def of_logits(case, backend, **settings):
    """(loss, gradient, expected loss, expected gradient)."""
    student, teachers, weights, mask = cases.logits(case)
    expected, by_token, gradient = cases.dense(case, student, teachers, weights, mask)
    settings = {"weights": weights, "mask": mask, "vocab": VOCAB, "backend": backend, **case.settings, **settings}
    leaf = student.clone().requires_grad_()
    loss = api.distillation_loss(leaf * 1, teachers, **settings)
    if loss.dim():
        assert (loss[~mask] == 0).all()
        torch.testing.assert_close(loss[mask].double(), by_token[mask], rtol=LOSS_ERROR, atol=1e-6)
        (loss.sum() / mask.sum()).backward()
        loss = loss.sum() / mask.sum()
    else:
        loss.backward()
    return loss, leaf.grad, expected, gradient


def check(case, backend, **settings):
    loss, found, expected, gradient = of_logits(case, backend, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_ERROR), case
    assert found.dtype == case.dtype
    assert cases.relative(found, gradient) <= cases.allowed_error(gradient, case.dtype, backend), case
    assert (found[3] == 0).all()
    assert (found[:, SIZE:] == 0).all()


def test_few(backend):
    for case in cases.FEW[::3] if backend == "triton" else cases.FEW:
        check(case, backend)


@pytest.mark.slow
def test_full_grid(backend):
    for case in cases.FULL:
        check(case, backend)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_by_token(backend, beta):
    """Each token's loss, and gradients for upstream factors that differ by token."""
    case = Case(beta, "probs", 2, 0.7)
    check(case, backend, reduction="none")
    student, teachers, weights, mask = cases.logits(case)
    factors = torch.linspace(-1, 2, len(student))
    leaf = student.clone().requires_grad_()
    settings = {"weights": weights, "mask": mask, "vocab": VOCAB, "reduction": "none", **case.settings}
    (api.distillation_loss(leaf * 1, teachers, backend=backend, **settings) * factors).sum().backward()
    _, _, gradient = cases.dense(case, student, teachers, weights, mask)
    assert cases.relative(leaf.grad, gradient * mask.sum() * factors[:, None]) <= 2e-6


def test_float64_and_half_are_for_the_reference():
    for dtype, error in ((torch.float64, 1e-12), (torch.float16, 2.2e-3)):
        case = Case(0.5, "probs", 2, 1.0, dtype)
        _, found, _, gradient = of_logits(case, "auto")
        assert cases.relative(found, gradient) <= error
        with pytest.raises(ValueError, match="backend 'native' cannot be had"):
            of_logits(case, "native")


def test_triton_takes_half():
    """Also its masked stores of what float32 knows and fp16 does not, which must be infinite and not something else."""
    pytest.importorskip("triton")
    for case in (Case(0.5, "probs", 2, 1.0, torch.float16), Case(1.0, "logits", 1, 0.7, torch.float16)):
        _, found, _, gradient = of_logits(case, "triton")
        assert found.dtype == torch.float16
        assert cases.relative(found, gradient) <= 2.2e-3
    case = Case(1.0, "logits", 1, 1.0, torch.float16)
    (h, head), teachers, weights, _ = cases.hidden(case)
    h.requires_grad_()
    api.linear_distillation_loss(h, head, teachers, weights=weights, vocab=VOCAB, backend="triton").mul(1e9).backward()
    assert h.grad.isinf().any()


def linear(case, backend, **settings):
    """(loss, gradients of hidden states and head, those of the logits form through the same products)."""
    (h, head), teachers, weights, mask = cases.hidden(case)
    settings = {"weights": weights, "mask": mask, "vocab": VOCAB, **case.settings, **settings}
    z = [(x @ w.T) for x, w in ((h, head), *teachers)]
    expected, by_token, gradient = cases.dense(case, z[0], z[1:], weights, mask)
    h, head = h.requires_grad_(), head.requires_grad_()
    loss = api.linear_distillation_loss(h, head, teachers, backend=backend, **settings)
    if loss.dim():
        torch.testing.assert_close(loss[mask].double(), by_token[mask], rtol=LOSS_ERROR, atol=1e-6)
        loss = loss.sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_ERROR), case
    with torch.no_grad():
        return h.grad, head.grad, gradient @ head.double(), gradient.T @ h.double()


LINEAR = [Case(beta, how, n, 0.8) for beta in (0.0, 0.5, 1.0) for how in ("logits", "probs") for n in (1, 3)]


@pytest.mark.parametrize("chunk_tokens", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states(backend, chunk_tokens, reduction):
    for case in LINEAR[::5] if backend == "triton" else LINEAR:
        found = linear(case, backend, chunk_tokens=chunk_tokens, reduction=reduction)
        assert cases.relative(found[0], found[2]) <= GRADIENT_ERROR[case.dtype], case
        assert cases.relative(found[1], found[3]) <= GRADIENT_ERROR[case.dtype], case


def test_hidden_states_in_bfloat16(backend):
    """The gradient of the logits is rounded once more on its way through the products, as any bf16 layer's is."""
    error = 5e-3 if backend != "triton" else 1e-2  # whose interpreter truncates
    for case in LINEAR[:: 5 if backend == "triton" else 1]:
        case = Case(case.beta, case.ensemble, case.num_teachers, case.temperature, torch.bfloat16)
        found = linear(case, backend, chunk_tokens=4)
        assert cases.relative(found[0], found[2]) <= error, case
        assert cases.relative(found[1], found[3]) <= error, case


def test_masked_tokens_are_not_looked_at(backend):
    """Whatever they hold, and in hidden states as in logits."""
    case = Case(0.5, "logits", 2, 1.0)
    student, teachers, weights, mask = cases.logits(case)
    student[~mask] = float("nan")
    leaf = student.clone().requires_grad_()
    settings = {"mask": mask, "weights": weights, "vocab": VOCAB, "backend": backend, **case.settings}
    api.distillation_loss(leaf * 1, teachers, **settings).backward()
    assert (leaf.grad[~mask] == 0).all()
    assert leaf.grad.isfinite().all()
    (h, head), pairs, weights, mask = cases.hidden(case)
    h[~mask] = float("nan")
    h.requires_grad_()
    settings |= {"mask": mask, "weights": weights}
    api.linear_distillation_loss(h, head.requires_grad_(), pairs, **settings).backward()
    assert (h.grad[~mask] == 0).all()
    assert h.grad.isfinite().all()
    assert head.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("how", ["logits", "probs"])
def test_far_apart(backend, beta, how):
    """Probabilities that float32 cannot hold: logits hundreds apart, student and teachers certain of other tokens."""
    case = Case(beta, how, 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    student, *teachers = [40 * torch.randn(4, 300, generator=generator) for _ in range(3)]
    weights, mask = torch.full((4, 2), 0.5), torch.ones(4, dtype=torch.bool)
    expected, _, gradient = cases.dense(case, student, teachers, weights, mask, size=300)
    leaf = student.clone().requires_grad_()
    loss = api.distillation_loss(leaf, teachers, backend=backend, **case.settings)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_ERROR)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_teacher_that_is_the_student(backend, beta):
    student = cases.logits(Case(beta, "logits", 1, 1.0))[0][:, :SIZE].contiguous()
    leaf = student.clone().requires_grad_()
    loss = api.distillation_loss(leaf, [student], beta=beta, backend=backend)
    loss.backward()
    assert abs(loss.item()) <= 1e-7
    assert leaf.grad.abs().max() <= 1e-7


def test_equal_weights_and_shapes_of_any_rank(backend):
    student, teachers, *_ = cases.logits(Case(1.0, "logits", 2, 1.0))
    student, teachers = student[4:], [t[4:] for t in teachers]
    flat = api.distillation_loss(student.clone(), teachers, vocab=VOCAB, backend=backend)
    cube = api.distillation_loss(
        student.clone()[:, None], [t[:, None] for t in teachers], weights=[2, 2], vocab=VOCAB, backend=backend
    )
    assert flat == cube
    by_token = api.distillation_loss(
        student[:, None], [t[:, None] for t in teachers], vocab=VOCAB, reduction="none", backend=backend
    )
    assert by_token.shape == (2, 1)
    assert by_token.mean().item() == pytest.approx(flat.item())


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)], ids=str)
def test_a_leaf_keeps_its_logits(backend, shape):
    """Also one of several dimensions, which the loss sees as a view."""
    generator = torch.Generator().manual_seed(0)
    leaf, teacher = torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)
    before = leaf.clone()
    leaf.requires_grad_()
    first = api.distillation_loss(leaf, [teacher], backend=backend)
    assert torch.equal(leaf, before)
    first.backward()
    assert torch.equal(leaf, before)
    assert api.distillation_loss(leaf, [teacher], backend=backend).item() == first.item()
    made = leaf * 1
    api.distillation_loss(made.view(6, 40), [teacher.view(6, 40)], backend=backend)
    assert not torch.equal(made, before)  # the gradient is there: nothing was copied


def plain_linear(num_tokens, dtype, *, columns=40, size=8):
    """(hidden states, head, teacher's pair): small, without padding."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, size), (columns, size), (num_tokens, size), (columns, size)
    h, head, th, t_head = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return h, head, (th, t_head)


@pytest.mark.parametrize(("num_tokens", "chunk_tokens"), [(1, 1), (1, 4), (5, 4), (9, 4), (7, 3), (8, 4), (33, 16)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_last_chunk_of_any_length(num_tokens, chunk_tokens, beta):
    """Also of a single token."""
    h, head, (th, t_head) = plain_linear(num_tokens, torch.float64)
    target = oracle.log_softmax(th @ t_head.T, len(head))

    def dense(x, w):
        return oracle.divergence(oracle.log_softmax(x @ w.T, len(w)), target, beta).mean()

    expected, of_h = oracle.grad(lambda x: dense(x, head), h)
    _, of_head = oracle.grad(lambda w: dense(h, w), head)
    h.requires_grad_()
    head.requires_grad_()
    loss = api.linear_distillation_loss(h, head, [(th, t_head)], beta=beta, chunk_tokens=chunk_tokens)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(h.grad, of_h, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(head.grad, of_head, atol=1e-12, rtol=1e-9)


def test_the_head_s_gradient_is_summed_over_chunks_in_float32():
    """In bf16, whose eight bits lose what the 2000th chunk adds; also without Megatron's `main_grad`."""
    h, head, (th, t_head) = plain_linear(2048, torch.bfloat16)
    target = oracle.log_softmax((th @ t_head.T).double(), len(head))
    _, of_logits = oracle.grad(lambda z: oracle.kl(target, oracle.log_softmax(z, 40)).mean(), (h @ head.T).double())
    expected = of_logits.bfloat16().double().T @ h.double()
    head.requires_grad_()
    api.linear_distillation_loss(h, head, [(th, t_head)], beta=0.0, chunk_tokens=1).backward()
    rounding = cases.relative(expected.bfloat16(), expected)
    assert cases.relative(head.grad, expected) <= 1.5 * rounding


def test_products_that_are_added_up_are_not_rounded_before():
    """bf16 gradients and hidden states into a float32 sum: as exact as float32 is."""
    generator = torch.Generator().manual_seed(0)
    grad, h = (torch.randn(64, size, generator=generator).bfloat16() for size in (20, 12))
    into = torch.randn(20, 12, generator=generator)
    expected = into.double() + grad.double().T @ h.double()
    chunks.add_head_gradient(grad, h, into)
    assert cases.relative(into, expected) <= 1e-6
