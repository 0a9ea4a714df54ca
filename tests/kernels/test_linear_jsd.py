from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import linear_jsd
from fastllm.kernels.loss import linear_chunks, reference
from tests.numerics import DTYPES, assert_accurate, long_row, with_gradients

BETAS = (0.0, 0.1, 0.5, 1.0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter, on small inputs; and blocks of the sum in float32."""
    monkeypatch.setattr(linear_chunks, "chunk_size", lambda tokens: min(max(tokens, 1), 8))
    monkeypatch.setattr(linear_chunks._Sum, "BLOCK", 32)


@pytest.fixture(autouse=True)
def products_as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels see logits in the dtype of hidden, in the interpreter and the emulator too."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") in ("triton", "cuda"):
        monkeypatch.setattr(linear_chunks, "_product_dtype", lambda hidden: hidden.dtype)


def layer(tokens: int, features: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    weight = torch.randn(classes, features) / features**0.5
    return [t.to(dtype) for t in (torch.randn(tokens, features), weight, torch.randn(classes))]


def inputs(tokens=21, classes=100, dtype=torch.float32, *, features=(12, 7)) -> tuple[list[Tensor], list[Tensor]]:
    """(hidden, weight, bias) of the student and of the teacher."""
    student, teacher = (layer(tokens, n, classes, dtype) for n in features)
    return student, teacher


def loss_of(hidden, weight, bias, *, teacher, **options) -> Tensor:
    other, other_weight, other_bias = (None if t is None else t.to(hidden.dtype) for t in teacher)
    return linear_jsd(hidden, weight, other, other_weight, bias=bias, teacher_bias=other_bias, **options)


def check(student, teacher, backend, **options) -> None:
    """Loss and gradients by the rule for numerics; PyTorch holds all the logits."""
    accumulate = options.pop("accumulate_float32", False)
    shape = student[0].shape[:-1]
    grads = [torch.rand(shape if options.get("reduction") == "none" else ()) + 0.5]
    run = partial(loss_of, teacher=teacher, **options)
    exact = with_gradients(partial(run, backend="torch"), student, grads, Tensor.double)
    eager = with_gradients(partial(run, backend="torch"), student, grads)
    actual = with_gradients(partial(run, backend=backend, accumulate_float32=accumulate), student, grads)
    known = terms(student, teacher, grads, accumulate, **options)
    names = ["loss", "dhidden", "dweight"] + ([] if student[2] is None else ["dbias"])
    for name, a, b, c in zip(names, actual, eager, exact, strict=True):
        assert_accurate(a, b, c, name, known[name])


def terms(student, teacher, grads, accumulate, *, mask=None, beta=0.5, temperature=1.0, **options) -> dict[str, Tensor]:
    """The magnitudes that each result adds up; that the logits' gradient is rounded to the dtype, and dweight between
    chunks, is part of the definition."""
    hidden, weight, _ = (None if t is None else t.double() for t in student)
    logits = [F.linear(*(None if t is None else t.double() for t in model)) for model in (student, teacher)]
    size = sum(F.linear(h.double().abs(), w.double().abs()) for h, w, _ in (student, teacher)) / temperature
    lq, lp = ((x / temperature).log_softmax(-1) for x in logits)
    lm = torch.logaddexp(lq + torch.tensor(1 - beta).log(), lp + torch.tensor(beta).log())
    q, p, size = lq.exp(), lp.exp(), 1 + size + lq.abs() + lp.abs()
    ratios = (lq - lm).abs() + (lp - lm).abs()
    each = ((p + q) * (ratios if 0 < beta < 1 else (lq - lp).abs() + 1) * size).sum(-1)
    # what a rounding of a score moves a gradient by
    moved = (p + q) * (1 + (lq - lp).abs() + each.unsqueeze(-1)) * size / temperature
    loss = partial(reference.jsd, teacher=logits[1], mask=mask, beta=beta, temperature=temperature, **options)
    (upstream,) = grads
    (dlogits,) = with_gradients(loss, [logits[0]], [upstream.double()])[-1:]
    if mask is not None:
        each, moved = each * mask, moved * mask.unsqueeze(-1)
    if options.get("reduction") == "none":
        moved = moved * upstream.unsqueeze(-1)
    else:
        share = 1 if options.get("reduction") == "sum" else max(1, len(each) if mask is None else int(mask.sum()))
        each, moved = each.sum() / share, moved * upstream / share
    chunks = [g.t() @ h for g, h in zip(dlogits.split(8), hidden.split(8), strict=True)] or [torch.zeros_like(weight)]
    sums = torch.stack(chunks) if accumulate else torch.stack(chunks).cumsum(0)
    steps = torch.finfo(student[0].dtype).eps / torch.finfo(torch.float32).eps
    moved, rounded = moved + dlogits.abs() * steps, sums.abs().sum(0) * steps
    return {
        "loss": each,
        "dhidden": moved @ weight.abs(),
        "dweight": moved.t() @ hidden.abs() + rounded,
        "dbias": moved.sum(0),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("way", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "mask and temperature"])
def test_accuracy(backend, beta, way, dtype, more):
    options = {"mask": torch.rand(9) < 0.7, "temperature": 1.7} if more else {}
    check(*inputs(9, dtype=dtype), backend, beta=beta, reduction=way, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("classes", [1, 2, 15, 64, 1000, 5003, 40001])
def test_any_number_of_classes(backend, beta, classes):
    check(*inputs(2, long_row(backend, classes)), backend, beta=beta, reduction="none")


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["no bfloat16", "bfloat16"])
def test_chunks(dtype, beta, bfloat16, monkeypatch):
    """With products in bfloat16 and, on processors that have none, in float32."""
    monkeypatch.setattr(linear_chunks, "multiplies_bfloat16", lambda: bfloat16)
    for tokens, accumulate in ((1, False), (8, True), (21, True), (70, False)):
        (hidden, weight, _), teacher = inputs(tokens, 77, dtype)
        check([hidden, weight, None], teacher, "cpu", beta=beta, accumulate_float32=accumulate)


def test_every_instruction_set(instruction_set):
    for dtype in DTYPES:
        for beta in (*BETAS, 0.97):
            check(*inputs(9, 333, dtype), "cpu", beta=beta, temperature=0.6)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    classes=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    beta=st.one_of(st.sampled_from(BETAS), st.floats(0.0, 1.0)),
    temperature=st.floats(0.3, 4.0),
    way=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_anything_on_the_cpu(tokens, classes, dtype, beta, temperature, way, seed):
    torch.manual_seed(seed)
    student, teacher = inputs(tokens, classes, dtype)
    check(student, teacher, "cpu", beta=beta, temperature=temperature, reduction=way, mask=torch.rand(tokens) < 0.8)


def test_convention_is_trls(any_backend):
    """Of GKDTrainer, whose "batchmean" divides by the tokens that its labels name."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl is not installed")
    student, teacher = inputs(15)
    shape, mask = (3, 5, -1), torch.rand(3, 5) < 0.6
    logits = [F.linear(*model).view(shape) for model in (student, teacher)]
    labels = torch.where(mask, 1, -100)
    for beta in BETAS:
        for temperature in (1.0, 0.7):
            theirs = gkd.GKDTrainer.generalized_jsd_loss(*logits, labels, beta=beta, temperature=temperature)
            ours = linear_jsd(
                student[0].view(shape), student[1], teacher[0].view(shape), teacher[1], bias=student[2],
                teacher_bias=teacher[2], mask=mask, beta=beta, temperature=temperature, backend=any_backend,
            )  # fmt: skip
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_learns_nothing(any_backend, beta):
    """Exactly, not nearly."""
    (hidden, weight, bias), _ = inputs(10, 301)
    for reduction in ("mean", "none"):
        run = partial(linear_jsd, reduction=reduction, beta=beta, temperature=0.7, backend=any_backend)
        loss, *grads = with_gradients(
            lambda h, w, b, run=run: run(h, w, hidden, weight, bias=b, teacher_bias=bias).sum(),
            [hidden, weight, bias], [torch.ones(())],
        )  # fmt: skip
        if any_backend == "torch":
            assert loss < 1e-5 and all(g.abs().max() < 1e-5 for g in grads)
        else:
            assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.9])
def test_a_small_divergence_is_not_lost(backend, beta):
    """Of distributions that differ by a ten-thousandth, it is a square of that: PyTorch's own form in float32 has
    hardly a digit of it, and float64 has."""
    (hidden, weight, bias), _ = inputs(10, 300)
    teacher = [hidden, weight, bias + 1e-4 * torch.randn(300)]
    exact = loss_of(*(t.double() for t in (hidden, weight, bias)), teacher=teacher, beta=beta)
    torch.testing.assert_close(
        loss_of(hidden, weight, bias, teacher=teacher, beta=beta, backend=backend).double(), exact, rtol=0.5, atol=0
    )


def at_logits(student: Tensor, teacher: Tensor, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Loss and the gradient of given logits: row by row the bias of a layer without features."""
    losses, grads = [], []
    for s, t, g in zip(student, teacher, upstream, strict=True):
        nothing = [s.new_zeros(1, 0), s.new_zeros(len(s), 0)]
        loss, dbias = with_gradients(
            lambda b, t=t, n=nothing: linear_jsd(*n, *n, bias=b, teacher_bias=t, reduction="none", **options),
            [s], [g.view(1)],
        )  # fmt: skip
        losses.append(loss)
        grads.append(dbias)
    return torch.cat(losses), torch.stack(grads)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(backend, beta, dtype):
    """Probabilities that underflow to 0, and scores of 10,000, whose log-sum-exp in one number would lose digits."""
    student, teacher = (s * torch.randn(2, 6, 50) for s in (200.0, 1.0))
    student[:, 2:4] += 1e4
    teacher[:, 3:5] -= 1e4
    student, teacher = ((a * torch.tensor([1, 0, 1, 1, 1, 40.0])[:, None] + b).to(dtype)
                        for a, b in ((student[0], student[1]), (teacher[0], teacher[1])))  # fmt: skip
    upstream = torch.rand(6)
    run = partial(at_logits, beta=beta)
    exact = run(student.double(), teacher.double(), upstream.double(), backend="torch")
    eager, actual = (run(student, teacher, upstream, backend=b) for b in ("torch", backend))
    assert all(t.isfinite().all() for t in actual)
    size = student.double().abs() + teacher.double().abs()
    for name, a, b, c in zip(("loss", "gradient"), actual, eager, exact, strict=True):
        assert_accurate(a, b, c, name, size.amax(-1) if name == "loss" else size)


@pytest.mark.parametrize("beta", BETAS)
def test_classes_that_are_ruled_out(any_backend, beta):
    """-inf where neither, the teacher alone, or the student alone rules a class out."""
    student, teacher = torch.randn(2, 3, 40)
    student[:, 3] = teacher[:, 3] = float("-inf")
    teacher[1, 5] = student[2, 7] = float("-inf")
    loss, grad = at_logits(student, teacher, torch.ones(3), beta=beta, backend=any_backend)
    kept = torch.arange(40) != 3
    clean, clean_grad = at_logits(student[:, kept], teacher[:, kept], torch.ones(3), beta=beta, backend=any_backend)
    torch.testing.assert_close(loss, clean)
    infinite = {0.0: 2, 1.0: 1}.get(beta)  # all mass of p must be q's, and the other way round
    for row in range(3):
        assert bool(loss[row].isinf()) == (row == infinite)
        if row != infinite:
            torch.testing.assert_close(grad[row, kept], clean_grad[row])
            assert grad[row, 3] == 0 and grad[row].isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tokens_that_do_not_count(any_backend, reduction, beta):
    """As if they were not there, whatever their logits; those of the others are as without them."""
    (hidden, weight, bias), teacher = inputs(14, 30)
    mask = torch.tensor([True, True, False, True, False, True, True] * 2)
    spoilt = hidden.clone(), teacher[0].clone()
    for t in spoilt:
        t[~mask] = torch.tensor([float("nan"), float("inf")] * 2).unsqueeze(-1)
    run = partial(
        linear_jsd, weight=weight, teacher_weight=teacher[1], bias=bias, teacher_bias=teacher[2], beta=beta,
        reduction=reduction, backend=any_backend,
    )  # fmt: skip
    one = [torch.ones(())]
    loss, grad = with_gradients(lambda h: run(h, teacher_hidden=spoilt[1], mask=mask).sum(), spoilt[:1], one)
    expected, rows = with_gradients(lambda h: run(h, teacher_hidden=teacher[0][mask]).sum(), [hidden[mask]], one)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[mask], rows)
    assert not grad[~mask].any()
    if reduction == "none":
        each = linear_jsd(hidden, weight, *teacher[:2], mask=mask, reduction="none", backend=any_backend)
        assert not each[~mask].any() and each[mask].all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(any_backend, reduction):
    student, teacher = inputs(10, 20)
    loss, *grads = with_gradients(
        lambda *t: loss_of(
            *t, teacher=teacher, mask=torch.zeros(10).bool(), reduction=reduction, backend=any_backend
        ).sum(),
        student, [torch.ones(())],
    )  # fmt: skip
    assert loss == 0
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tokens(any_backend, shape, reduction):
    (_, weight, bias), (_, other, _) = inputs(1, 20)
    leaves = [t.requires_grad_() for t in (torch.randn(*shape, 12), weight, bias)]
    loss = linear_jsd(
        *leaves[:2], torch.randn(*shape, 7), other, bias=leaves[2], reduction=reduction, backend=any_backend
    )
    assert loss.shape == (shape if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum() == 0 and all(torch.equal(t.grad, torch.zeros_like(t)) for t in leaves)


def test_leading_dimensions_and_strides(backend):
    """Of every argument; test_strides.py has all of them."""
    (hidden, weight, bias), teacher = inputs(24, 30)
    mask = torch.rand(24, 2) < 0.7
    options = {"bias": bias, "teacher_bias": teacher[2], "beta": 0.3}
    for reduction in ("mean", "none"):
        got = linear_jsd(
            hidden.view(4, 6, 12).transpose(0, 1), weight.t().contiguous().t(),
            teacher[0].view(4, 6, 7).transpose(0, 1), teacher[1].t().contiguous().t(),
            mask=mask[:, 0].view(4, 6).t(), reduction=reduction, backend=backend, **options,
        )  # fmt: skip
        expected = linear_jsd(
            hidden, weight, *teacher[:2], mask=mask[:, 0].contiguous(), reduction=reduction, backend="torch", **options
        )
        torch.testing.assert_close(got, expected if reduction == "mean" else expected.view(4, 6).t())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(backend, reduction):
    """A frozen head, or a hidden state without gradient, and no gradient at all; never one of the teacher's."""
    student, teacher = inputs(10, 20)
    full = with_gradients(
        lambda *t: loss_of(*t, teacher=teacher, reduction=reduction, backend=backend).sum(), student, [torch.ones(())]
    )
    for i in range(3):
        leaves = [t.clone().requires_grad_(i == k) for k, t in enumerate(student)]
        others = [t.clone().requires_grad_() for t in teacher]
        loss_of(*leaves, teacher=others, reduction=reduction, backend=backend).sum().backward()
        assert all(t.grad is None for t in (*others, *leaves) if t is not leaves[i])
        torch.testing.assert_close(leaves[i].grad, full[1 + i])
    assert not loss_of(*student, teacher=others, backend=backend).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    """Gradients are scaled into new memory: a graph that is kept may be used again, with another factor."""
    student, teacher = inputs(10, 20)
    leaves = [t.requires_grad_() for t in student]
    loss = loss_of(*leaves, teacher=teacher, reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    thrice = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for a, b, c, k in zip(first, thrice, torch.autograd.grad(loss, leaves), kept, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, k) and torch.equal(c, k)


def test_weights_in_float32(backend):
    """They are rounded to the dtype of hidden, and get their gradient in float32."""
    student, teacher = inputs(21, 50, torch.bfloat16)
    one = [torch.ones(())]
    wide, same = (
        with_gradients(
            lambda h, w, b, c=cast: linear_jsd(
                h, w, teacher[0], c(teacher[1]), bias=b, teacher_bias=c(teacher[2]), backend=backend
            ),
            [student[0], *map(cast, student[1:])], one,
        )
        for cast in (Tensor.float, lambda t: t)
    )  # fmt: skip
    assert wide[2].dtype == wide[3].dtype == torch.float32
    for a, b in zip(wide, same, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=0)


def test_autocast(backend):
    student, teacher = inputs(21, 50)
    one = [torch.ones(())]
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(partial(loss_of, teacher=teacher, backend=backend), student, one)
    narrow = [student[0].bfloat16(), *student[1:]]
    plain = with_gradients(partial(loss_of, teacher=teacher, backend=backend), narrow, one)
    assert torch.equal(cast[0], plain[0])
    for a, b in zip(cast[1:], plain[1:], strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.to(b.dtype), b)


def test_float16_survives_a_loss_scale():
    """With reduction "mean" the gradient of a logit is below float16's smallest number, but for the loss scale."""
    (hidden, weight, _), teacher = inputs(4096, 300, torch.float16)
    leaf = hidden.clone().requires_grad_()
    (2.0**16 * linear_jsd(leaf, weight, *teacher[:2])).backward()
    wide = hidden.double().requires_grad_()
    linear_jsd(wide, weight.double(), *(t.double() for t in teacher[:2])).backward()
    torch.testing.assert_close(leaf.grad.double() / 2**16, wide.grad, rtol=2e-2, atol=2e-7)


def test_memory_is_a_chunk_of_each_model(monkeypatch):
    """The kernel sees two buffers of eight tokens' logits, again and again."""
    from fastllm.kernels.loss import native

    jsd, seen = native.jsd, []

    def spy(*given):
        seen.append(given[:2])
        jsd(*given)

    monkeypatch.setattr(native, "jsd", spy)
    student, teacher = inputs(66, 1000)
    loss_of(*(t.requires_grad_() for t in student), teacher=teacher)
    assert [len(s) for s, _ in seen] == [len(t) for _, t in seen] == [8] * 8 + [2]
    assert len({s.data_ptr() for s, _ in seen}) == len({t.data_ptr() for _, t in seen}) == 1


def test_threads_do_not_change_the_result():
    student, teacher = inputs(300, 500)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(loss_of(*student, teacher=teacher, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("beta", BETAS)
def test_cuda_threads_in_any_order(simt, beta, seed):
    student, teacher = inputs(5, 3000, torch.bfloat16)
    run = partial(
        with_gradients, partial(loss_of, teacher=teacher, beta=beta, backend="cuda"), student, [torch.ones(())]
    )
    in_order = run()
    simt.set_seed(seed)
    try:
        shuffled = run()
    finally:
        simt.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction):
    student, teacher = inputs(10, 20)
    student[0].requires_grad_()
    loss = loss_of(*student, teacher=teacher, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, student[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_jsd: its kernels have no second derivative"):
        grad.sum().backward()


def test_opcheck():
    student, teacher = inputs(10, 20)
    mask, options, ops = torch.rand(10) < 0.7, (0.3, 0.7, 1.5, "cpu"), torch.ops.fastllm
    torch.library.opcheck(ops.linear_jsd_forward, (*student, *teacher, mask, *options))
    wanted = (True, True, False, False)
    torch.library.opcheck(
        ops.linear_jsd_with_gradients, (*student, *teacher, None, torch.ones(()).expand(10), *wanted, *options)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(backend, dynamic, reduction):
    """One graph; the same numbers as without compile, with tokens that do not count too."""
    torch._dynamo.reset()
    masked = dynamic == (reduction == "mean")  # with each reduction once, and once with each kind of shapes

    def call(h, w, b, teacher, mask):
        return 2 * loss_of(h * 2, w, b, teacher=teacher, mask=mask, beta=0.3, reduction=reduction, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 13):
        student, teacher = inputs(tokens, 20)
        mask = torch.rand(tokens) < 0.6 if masked else None
        grads = [torch.ones(tokens if reduction == "none" else ())]
        for got, expected in zip(
            with_gradients(partial(compiled, teacher=teacher, mask=mask), student, grads),
            with_gradients(partial(call, teacher=teacher, mask=mask), student, grads),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_on_a_gpu(backend_on_gpu, dtype, beta):
    """Like PyTorch's own, by the norm of the error."""
    student, teacher = ([t.cuda() for t in model] for model in inputs(1000, 32000, dtype, features=(256, 128)))
    mask = torch.rand(1000, device="cuda") < 0.8
    for way in ("mean", "none"):
        grads = [torch.ones(mask.shape if way == "none" else (), device="cuda")]
        run = partial(loss_of, teacher=teacher, mask=mask, beta=beta, temperature=1.5, reduction=way)
        exact = with_gradients(partial(run, backend="torch"), student, grads, Tensor.double)
        eager = with_gradients(partial(run, backend="torch"), student, grads)
        actual = with_gradients(partial(run, backend=backend_on_gpu), student, grads)
        for a, b, c in zip(actual, eager, exact, strict=True):
            rounding = torch.finfo(a.dtype).eps * c.norm()
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_no_host_sync_on_a_gpu(backend_on_gpu):
    student, teacher = ([t.cuda() for t in model] for model in inputs(300, 1000, torch.bfloat16))
    leaves, mask = [t.requires_grad_() for t in student], torch.rand(300, device="cuda") < 0.5
    run = partial(loss_of, *leaves, teacher=teacher, mask=mask, backend=backend_on_gpu)
    run().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
