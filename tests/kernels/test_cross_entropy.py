from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import CrossEntropyLoss, cross_entropy, use_backend
from tests.numerics import DTYPES, assert_accurate, long_row, on_gpus, with_gradients

IGNORE = -100


def inputs(rows, classes, dtype, *, ignored=0.2, spread=3.0, seed=None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    return logits, target.masked_fill(torch.rand(rows, generator=generator) < ignored, IGNORE)


def check(logits, target, backend, *, with_lse=True, **options) -> None:
    """Loss and log-sum-exp of each row, and the gradient through both, by the rule for numerics."""
    grads = [torch.randn(target.shape, device=logits.device) for _ in range(1 + with_lse)]
    call = partial(cross_entropy, reduction="none", return_lse=with_lse, **options)
    weight = options.get("weight")
    exact_call = call if weight is None else partial(call, weight=weight.double())

    def run(function, cast=lambda t: t):
        return with_gradients(lambda x: function(x, target), [logits], grads, cast)

    exact = run(partial(exact_call, backend="torch"), Tensor.double)
    eager, actual = run(partial(call, backend="torch")), run(partial(call, backend=backend))
    loss_terms, lse_terms, gradient_terms = terms(logits, target, *grads, **options)
    names = ["loss", "lse", "dlogits"] if with_lse else ["loss", "dlogits"]
    known = {"loss": loss_terms, "lse": lse_terms, "dlogits": gradient_terms}
    for name, a, b, c in zip(names, actual, eager, exact, strict=True):
        assert_accurate(a, b, c, name, known[name])


def terms(
    logits, target, dloss, dlse=None, *, weight=None, ignore_index=IGNORE, label_smoothing=0.0, z_loss=0.0, softcap=0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The magnitudes that loss, lse and dlogits add up."""
    scores = logits.double()
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    classes = scores.shape[-1]
    w = torch.ones(classes, dtype=torch.float64, device=logits.device) if weight is None else weight.double()
    lse, valid = scores.logsumexp(-1), target != ignore_index
    index = target.masked_fill(~valid, 0).long()
    own = (1 - label_smoothing) * w[index]
    total = own + label_smoothing * w.mean()
    at_target = scores.gather(-1, index.unsqueeze(-1)).squeeze(-1).abs()
    spread = label_smoothing / classes * (w * scores.abs()).sum(-1)
    loss = total * lse.abs() + own * at_target + spread + z_loss * lse.square()
    # what a rounding of a score or of lse moves p by, too
    p = (scores - lse.unsqueeze(-1)).exp() * (1 + scores.abs() + lse.abs().unsqueeze(-1))
    pull = dloss.double().abs() * valid
    push = pull * (total + 2 * z_loss * lse.abs()) + (0 if dlse is None else dlse.double().abs())
    gradient = push.unsqueeze(-1) * p + (pull * label_smoothing / classes).unsqueeze(-1) * w
    gradient = gradient.scatter_add(-1, index.unsqueeze(-1), (pull * own).unsqueeze(-1))
    if softcap:  # times 1 - t², and t is rounded, too
        gradient = gradient * (1 + 2 * (scores / softcap).square())
    return loss, lse.abs(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 64), (6, 100), (33, 128), (3, 1000), (9, 1024), (2, 4099)])
def test_accuracy(backend, shape, dtype):
    check(*inputs(*shape, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [8192, 32000, 50257, 131080, 262144])
def test_large_vocabularies(backend, classes, dtype):
    classes = long_row(backend, classes)
    logits, target = inputs(3, classes, dtype, ignored=0.0)
    logits[0] = logits[0].sort().values  # the maximum moves at every step
    target[2] = classes - 1
    check(logits, target, backend)


OPTIONS = {
    "label smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "weights": {"weight": True},
    "weights and smoothing": {"weight": True, "label_smoothing": 0.2},
    "ignore_index in range": {"ignore_index": 3},
    "everything": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 4.0, "ignore_index": 7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_arguments(backend, name, dtype, with_lse):
    logits, target = inputs(12, 72, dtype)
    options = dict(OPTIONS[name])
    if "ignore_index" in options:
        target = torch.where(target == IGNORE, options["ignore_index"], target)
    if options.get("weight"):
        options["weight"] = torch.rand(72) * (torch.rand(72) < 0.8)  # some weigh nothing
    check(logits, target, backend, with_lse=with_lse, **options)


@pytest.mark.parametrize("classes", [40001, 40008])
def test_arguments_on_long_rows(backend, classes):
    logits, target = inputs(3, classes, torch.bfloat16, ignored=0.0)
    check(logits, target, backend, weight=torch.rand(classes), label_smoothing=0.1, z_loss=1e-4, softcap=6.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32])
def test_reductions_are_pytorchs(backend, reduction, weighted, target_dtype):
    logits, target = inputs(40, 30, torch.float32)
    weight = torch.rand(30) if weighted else None
    options = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    for a, b in zip(
        with_gradients(
            lambda x: cross_entropy(x, target.to(target_dtype), backend=backend, **options).sum(), [logits],
            [torch.tensor(0.7)],
        ),
        with_gradients(lambda x: F.cross_entropy(x, target, **options).sum(), [logits], [torch.tensor(0.7)]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_bfloat16_is_more_accurate_than_pytorch(backend):
    """F.cross_entropy keeps log-probabilities in bfloat16, to within 1/32 at -10; these kernels hold float32."""
    logits, target = inputs(64, 2000, torch.bfloat16, ignored=0.0)
    one = [torch.ones(())]
    exact = with_gradients(lambda x: F.cross_entropy(x, target), [logits], one, Tensor.double)
    theirs = with_gradients(lambda x: F.cross_entropy(x, target), [logits], one)
    ours = with_gradients(partial(cross_entropy, target=target, backend=backend), [logits], one)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a.double() - c).norm() < 0.75 * (b.double() - c).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_valid_gives_zero_with_zero_gradients(backend, reduction, weighted):
    logits, target = inputs(5, 30, torch.float32, ignored=2.0)
    logits[1] = float("inf")
    logits[2] = float("nan")
    weight = torch.rand(30) if weighted else None
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, target, weight=weight, reduction=reduction, z_loss=0.1, backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(5, 30))


def test_weights_that_add_up_to_nothing(backend):
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 1, 1]), weight=torch.tensor([1.0, 0.0, 1.0, 1.0]), backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_infinite_logits(backend):
    """A class that is ruled out (-inf) costs nothing; a row of NaN stays alone."""
    logits, target = inputs(4, 50, torch.float32, ignored=0.0)
    target[:] = 1
    clean = cross_entropy(logits, target, reduction="none", backend=backend)
    logits[0, 7] = float("-inf")
    logits[1, 9] = float("nan")
    logits[2, 1] = float("-inf")
    loss, dlogits = with_gradients(
        partial(cross_entropy, target=target, reduction="none", backend=backend), [logits], [torch.ones(4)]
    )
    torch.testing.assert_close(loss[0], F.cross_entropy(logits[:1], target[:1]))
    assert dlogits[0, 7] == 0
    assert loss[1].isnan()
    assert loss[2] == float("inf")
    assert loss[3] == clean[3]


def views() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 3 * 48).to(torch.bfloat16)
    return {
        "columns cut out": x[..., 5:37],
        "every other row": x[:, ::2],
        "all but the last token": x[:, :-1],
        "transposed rows": x.transpose(0, 1),
        "three strides": x.unflatten(-1, (9, 16))[::2, ::2, ::2],
        "strided columns": x[..., ::2],
        "one row repeated": x[:1, :1].expand(3, 5, -1),
    }


@pytest.mark.parametrize("name", views())
def test_strides(backend, name):
    x = views()[name]
    check(x, torch.randint(x.shape[-1], x.shape[:-1]), backend)


def test_strided_targets_and_gradients(backend):
    """Every other element of a tensor, which reshape leaves strided; the others would be out of range or NaN."""
    logits, target = inputs(6, 40, torch.float32)
    target = torch.stack([target, torch.full_like(target, 2**40)], -1)[:, 0]
    upstream = torch.full((2, 6, 2), float("nan"))
    upstream[..., 0] = torch.rand(2, 6)
    call = partial(cross_entropy, reduction="none", return_lse=True, backend=backend)
    got = with_gradients(partial(call, target=target), [logits], list(upstream[..., 0]))
    expected = with_gradients(partial(call, target=target.contiguous()), [logits], list(upstream[..., 0].contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(t.isfinite().all() for t in expected)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0, 16)])
def test_no_rows(backend, shape):
    logits = torch.randn(shape, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(shape[:-1], dtype=torch.long), backend=backend)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == shape


def test_inputs_are_not_changed(backend):
    logits, target = inputs(5, 33, torch.float32)
    weight = torch.rand(33)
    before = [t.clone() for t in (logits, target, weight)]
    with_gradients(lambda x: cross_entropy(x, target, weight=weight, backend=backend), [logits], [torch.ones(())])
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, target, weight), strict=True))


# ---- the gradient over the logits ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend, dtype):
    logits, target = inputs(6, 40, dtype)
    hidden = logits.requires_grad_()

    def run(**options):
        scores = hidden * 1  # no leaf: its memory is free for the gradient
        address = scores.data_ptr()
        scores.register_hook(lambda g: seen.append(g.data_ptr() == address))
        cross_entropy(scores, target, backend=backend, **options).backward()
        gradient, hidden.grad = hidden.grad, None
        return gradient

    seen = []
    assert torch.equal(run(), run(inplace_backward=True))
    assert seen == [False, True]


def test_autograd_notices_overwritten_logits(backend):
    logits, target = inputs(6, 40, torch.float32)
    hidden = logits.requires_grad_()
    scores = hidden * 1
    other = scores.square().sum()  # needs the logits in its backward
    cross_entropy(scores, target, inplace_backward=True, backend=backend).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_inplace_backward_is_noticed(backend):
    logits, target = inputs(6, 40, torch.float32)
    scores = logits.requires_grad_() * 1
    loss = cross_entropy(scores, target, inplace_backward=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_leaves_strided_logits(backend):
    """Logits that are no contiguous memory of their own are not written to."""
    logits, target = inputs(6, 40, torch.float32)
    whole = logits.clone().requires_grad_()
    scores = whole * 1
    before = scores.detach().clone()
    cross_entropy(scores[:, 1:39], target.clamp(max=37), inplace_backward=True, backend=backend).backward()
    assert torch.equal(scores, before)


# ---- targets ----


@pytest.mark.parametrize("wrong", [30, -1, -99, 2**40])
def test_targets_out_of_range_raise(backend, wrong):
    logits, target = inputs(5, 30, torch.float32)
    target[3] = wrong
    with pytest.raises(
        IndexError, match=rf"target holds {wrong}, which is neither in \[0, 30\) nor the ignore_index -100"
    ):
        cross_entropy(logits, target, backend=backend)


@pytest.mark.parametrize("wrong", [30, -1, 2**40, -(2**62)])
def test_targets_out_of_range_are_never_read(backend, wrong, monkeypatch):
    """Where nobody checks, as on a GPU, such a row is NaN in loss and gradient, and the others are right."""
    from fastllm.kernels.loss import cross_entropy_op

    monkeypatch.setattr(cross_entropy_op, "check_range", lambda *_: None)
    logits, target = inputs(5, 30, torch.float32, ignored=0.0)
    clean = with_gradients(
        partial(cross_entropy, target=target, reduction="none", backend=backend), [logits], [torch.ones(5)]
    )
    target[3] = wrong
    weight = torch.ones(30)
    loss, dlogits = with_gradients(
        partial(cross_entropy, target=target, weight=weight, reduction="none", backend=backend),
        [logits],
        [torch.ones(5)],
    )
    assert loss[3].isnan()
    assert dlogits[3].isnan().all()
    assert torch.equal(loss[[0, 1, 2, 4]], clean[0][[0, 1, 2, 4]])
    assert torch.equal(dlogits[[0, 1, 2, 4]], clean[1][[0, 1, 2, 4]])


BAD = {
    "not a tensor": (lambda x, t: cross_entropy([1.0], t), TypeError, "logits must be a torch.Tensor"),
    "integers": (lambda x, t: cross_entropy(x.int(), t), TypeError, "logits must be float32"),
    "scalar": (lambda x, t: cross_entropy(x[0, 0], t), ValueError, "at least 1 dimension"),
    "no classes": (lambda x, t: cross_entropy(x[:, :0], t), ValueError, "there are no classes"),
    "target's shape": (lambda x, t: cross_entropy(x, t[:2]), ValueError, r"target must have shape \[4\], it has \[2\]"),
    "target's dtype": (lambda x, t: cross_entropy(x, t.float()), TypeError, "target must be int64 or int32"),
    "target elsewhere": (lambda x, t: cross_entropy(x, t.to("meta")), ValueError, "target is on meta"),
    "weight's shape": (lambda x, t: cross_entropy(x, t, weight=x[0, :3]), ValueError, "weight must have shape"),
    "weight's gradient": (
        lambda x, t: cross_entropy(x, t, weight=torch.ones(16, requires_grad=True)), ValueError, "gets no gradient",
    ),
    "reduction": (lambda x, t: cross_entropy(x, t, reduction="max"), ValueError, "reduction must be"),
    "smoothing": (lambda x, t: cross_entropy(x, t, label_smoothing=1.5), ValueError, "between 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("preferred", ["torch", "cpu", "triton", "cuda"])
def test_bad_input(simt, case, preferred):
    bad, error, message = BAD[case]
    with use_backend(preferred), pytest.raises(error, match=message):
        bad(torch.randn(4, 16), torch.randint(16, (4,)))


# ---- shapes, order, compile ----


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 900),
    dtype=st.sampled_from(DTYPES),
    smoothing=st.sampled_from([0.0, 0.1]),
    softcap=st.sampled_from([0.0, 8.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_on_the_cpu(rows, classes, dtype, smoothing, softcap, z_loss, weighted, seed):
    logits, target = inputs(rows, classes, dtype, seed=seed)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(seed)) if weighted else None
    check(logits, target, "cpu", weight=weight, label_smoothing=smoothing, softcap=softcap, z_loss=z_loss)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", [(37, 64), (5, 1000), (3, 8192), (2, 40001), (1, 262144)])
def test_cuda_threads_in_any_order(simt, shape, seed):
    logits, target = inputs(*shape, torch.bfloat16)
    grads = [torch.randn(shape[0]) for _ in range(2)]
    call = partial(cross_entropy, reduction="none", return_lse=True, label_smoothing=0.1, backend="cuda")
    run = partial(with_gradients, lambda x: call(x, target), [logits], grads)
    in_order = run()
    simt.set_seed(seed)
    try:
        shuffled = run()
    finally:
        simt.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


def test_threads_do_not_change_the_result():
    logits, target = inputs(300, 500, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                with_gradients(partial(cross_entropy, target=target, backend="cpu"), [logits], [torch.ones(())])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_module_has_torchs_arguments(backend):
    weight = torch.rand(30)
    options = {"weight": weight, "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    ours, theirs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    ours.load_state_dict(theirs.state_dict())
    logits, target = inputs(9, 30, torch.float32, ignored=0.0)
    with use_backend(backend):
        torch.testing.assert_close(ours(logits, target), theirs(logits, target))


def test_double_backward_raises(backend):
    logits, target = inputs(3, 8, torch.float32, ignored=0.0)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, backend=backend), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"cross_entropy: its kernels have no second derivative"):
        grad.sum().backward()


def test_opcheck(backend):
    logits, target = inputs(6, 16, torch.float32)
    weight = torch.rand(16)
    for weights in ((None, None), (weight, weight.mean())):
        options = (IGNORE, 0.1, 1e-3, 5.0, 0.7, 0, 16, backend)
        torch.library.opcheck(torch.ops.fastllm.cross_entropy_forward, (logits, target, *weights, *options))
        _, lse = torch.ops.fastllm.cross_entropy_forward(logits, target, *weights, *options)
        tensors = (target, *weights, lse, torch.randn(6), None, torch.randn(6), torch.rand(6))
        torch.library.opcheck(torch.ops.fastllm.cross_entropy_backward, (logits, *tensors, *options))
        torch.library.opcheck(torch.ops.fastllm.cross_entropy_backward_, (logits.clone(), *tensors, *options))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compile(backend, dynamic, inplace_backward):
    """One graph; the same numbers as without compile, with ignored targets too."""
    torch._dynamo.reset()

    def layer(x, target):
        return cross_entropy(
            x * 2, target, z_loss=1e-3, return_lse=True, inplace_backward=inplace_backward, backend=backend
        )

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        logits, target = inputs(rows, 32, torch.float32, ignored=0.5)
        grads = [torch.tensor(0.5), torch.randn(rows)]
        for got, expected in zip(
            with_gradients(partial(compiled, target=target), [logits], grads),
            with_gradients(partial(layer, target=target), [logits], grads),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_compile_with_inductor():
    torch._dynamo.reset()
    logits, target = inputs(8, 50, torch.float32, ignored=0.5)
    compiled = torch.compile(lambda x: cross_entropy(x * 2, target) + 1, fullgraph=True)
    plain = with_gradients(lambda x: cross_entropy(x * 2, target) + 1, [logits], [torch.ones(())])
    for got, expected in zip(with_gradients(compiled, [logits], [torch.ones(())]), plain, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend_on_gpu", "dtype", "shape"),
    on_gpus([(1, 1), (7, 3), (4096, 128), (33, 1000), (64, 32000), (9, 131080), (3, 262144)]),
    ids=str,
)
def test_on_a_gpu(backend_on_gpu, dtype, shape):
    logits, target = (t.cuda() for t in inputs(*shape, dtype))
    check(logits, target, backend_on_gpu)
    weight = torch.rand(shape[1], device="cuda")
    check(logits, target, backend_on_gpu, weight=weight, label_smoothing=0.1, z_loss=1e-3, softcap=5.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("name", views())
def test_strides_on_a_gpu(backend_on_gpu, name):
    x = views()[name].cuda()
    check(x, torch.randint(x.shape[-1], x.shape[:-1], device="cuda"), backend_on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_targets_on_a_gpu(backend_on_gpu):
    """Out of range: NaN in that row, no access outside; a clean context afterwards."""
    logits, target = (t.cuda() for t in inputs(5, 30, torch.float32, ignored=0.0))
    target[3] = 2**40
    loss, dlogits = with_gradients(
        partial(cross_entropy, target=target, reduction="none", backend=backend_on_gpu), [logits],
        [torch.ones(5, device="cuda")],
    )  # fmt: skip
    assert loss.isnan().tolist() == [False, False, False, True, False]
    assert dlogits[3].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_no_host_sync_on_a_gpu(backend_on_gpu):
    logits, target = (t.cuda() for t in inputs(64, 1000, torch.bfloat16))
    logits.requires_grad_()
    cross_entropy(logits, target, backend=backend_on_gpu).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(logits, target, inplace_backward=True, backend=backend_on_gpu).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_more_than_2_31_elements_on_a_gpu(backend_on_gpu):
    logits = torch.zeros(2**31 // 131072 + 8, 131072, dtype=torch.bfloat16, device="cuda")
    logits[0] = logits[-1] = torch.randn(131072, device="cuda").bfloat16()
    target = torch.full((len(logits),), 17, device="cuda")
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="none", backend=backend_on_gpu)
    assert loss[0] == loss[-1]
    loss.sum().backward()
    assert torch.equal(logits.grad[0], logits.grad[-1])
