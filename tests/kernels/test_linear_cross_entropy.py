from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import (
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_log_prob,
    use_backend,
)
from fastllm.kernels.loss import linear_chunks
from tests.numerics import DTYPES, assert_accurate, with_gradients

IGNORE = -100
CHUNK_SIZE = linear_chunks.chunk_size


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter, on small inputs; and blocks of the sum in float32."""
    monkeypatch.setattr(linear_chunks, "chunk_size", lambda tokens: min(max(tokens, 1), 8))
    monkeypatch.setattr(linear_chunks._Sum, "BLOCK", 32)


def inputs(tokens, features, classes, dtype, *, ignored=0.2) -> tuple[list[Tensor], Tensor]:
    hidden = torch.randn(tokens, features).to(dtype)
    weight, bias = (torch.randn(classes, features) / features**0.5).to(dtype), torch.randn(classes).to(dtype)
    target = torch.randint(classes, (tokens,))
    return [hidden, weight, bias], target.masked_fill(torch.rand(tokens) < ignored, IGNORE)


def loss_of(hidden, weight, bias, *, target, **options):
    return linear_cross_entropy(hidden, weight, target, bias=bias, **options)


def check(tensors, target, backend, **options) -> None:
    """Loss and gradients by the rule for numerics; PyTorch holds all the logits."""
    accumulate = options.pop("accumulate_float32", False)
    options["target"] = target
    shape = target.shape if options.get("reduction") == "none" else ()
    grads = [torch.rand(shape) + 0.5, torch.randn(target.shape)]
    exact_options = {k: v.double() if k == "class_weight" else v for k, v in options.items()}
    exact = with_gradients(partial(loss_of, backend="torch", **exact_options), tensors, grads, Tensor.double)
    eager = with_gradients(partial(loss_of, backend="torch", **options), tensors, grads)
    actual = with_gradients(partial(loss_of, backend=backend, accumulate_float32=accumulate, **options), tensors, grads)
    known = terms(tensors, grads, accumulate, **exact_options)
    names = ["loss", "lse"] if options.get("return_lse") else ["loss"]
    names += ["dhidden", "dweight"] if tensors[2] is None else ["dhidden", "dweight", "dbias"]
    for name, a, b, c in zip(names, actual, eager, exact, strict=True):
        assert_accurate(a, b, c, name, known[name])


def terms(tensors, grads, accumulate, *, target, class_weight=None, **options) -> dict[str, Tensor]:
    """The magnitudes that each result adds up; the roundings between chunks are part of dweight's definition."""
    hidden, weight, bias = (None if t is None else t.double() for t in tensors)
    logits, magnitude = F.linear(hidden, weight, bias), F.linear(hidden.abs(), weight.abs())
    losses = cross_entropy(logits, target, weight=class_weight, backend="torch", **options | {"reduction": "none"})
    losses = losses[0] if isinstance(losses, tuple) else losses
    largest = magnitude.amax(-1) + logits.logsumexp(-1).abs()
    per_token = largest * (1 + options.get("z_loss", 0.0) * largest)
    (dlogits,) = with_gradients(
        lambda x: cross_entropy(x, target, weight=class_weight, backend="torch", **options), [logits], grads
    )[-1:]
    moved = dlogits.abs() * (1 + magnitude)
    chunks = [
        g.t() @ h for g, h in zip(dlogits.split(linear_chunks.chunk_size(len(target))), hidden.split(8), strict=True)
    ] or [torch.zeros_like(weight)]
    sums = torch.stack(chunks) if accumulate else torch.stack(chunks).cumsum(0)
    rounded = sums.abs().sum(0) * torch.finfo(tensors[0].dtype).eps / torch.finfo(torch.float32).eps
    return {
        "loss": per_token if options.get("reduction") == "none" else per_token.amax() + losses.abs().sum(),
        "lse": largest,
        "dhidden": moved @ weight.abs(),
        "dweight": moved.t() @ hidden.abs() + rounded,
        "dbias": moved.sum(0),
    }


OPTIONS = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "weights": {"class_weight": True},
    "ignore_index in range": {"ignore_index": 3},
    "everything": {"class_weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 4.0, "ignore_index": 7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ["mean", "sum", "none", "with lse"])
def test_accuracy(backend, name, way, dtype):
    tensors, target = inputs(21, 12, 100, dtype)
    options = dict(OPTIONS[name])
    if "ignore_index" in options:
        target = torch.where(target == IGNORE, options["ignore_index"], target)
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(100)
    options |= {"return_lse": True} if way == "with lse" else {"reduction": way}
    check(tensors, target, backend, **options)


@pytest.fixture(autouse=True)
def products_as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels see logits in the dtype of hidden, in the interpreter and the emulator too."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") in ("triton", "cuda"):
        monkeypatch.setattr(linear_chunks, "_product_dtype", lambda hidden: hidden.dtype)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 21, 70])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["no bfloat16", "bfloat16"])
def test_chunks(tokens, dtype, accumulate, bfloat16, monkeypatch):
    """With products in bfloat16 and, on processors that have none, in float32."""
    monkeypatch.setattr(linear_chunks, "multiplies_bfloat16", lambda: bfloat16)
    (hidden, weight, _), target = inputs(tokens, 20, 77, dtype)
    check([hidden, weight, None], target, "cpu", accumulate_float32=accumulate)


def test_accumulation_in_float32_is_more_accurate(monkeypatch):
    """Many chunks that cancel: a bfloat16 sum loses what a float32 sum keeps."""
    monkeypatch.setattr(linear_chunks, "multiplies_bfloat16", lambda: True)
    (hidden, weight, _), target = inputs(800, 16, 30, torch.bfloat16, ignored=0.0)
    exact = with_gradients(
        lambda h, w: linear_cross_entropy(h, w, target), [hidden, weight], [torch.ones(())], Tensor.double
    )

    def error(accumulate):
        call = partial(linear_cross_entropy, target=target, accumulate_float32=accumulate)
        return (with_gradients(call, [hidden, weight], [torch.ones(())])[-1].double() - exact[-1]).norm()

    assert error(True) < 0.7 * error(False)


def test_products_that_add_to_float32(monkeypatch):
    """As cuBLAS multiplies: nothing is rounded between two chunks, not even a product."""
    monkeypatch.setattr(linear_chunks, "multiplies_bfloat16", lambda: True)
    (hidden, weight, _), target = inputs(800, 16, 30, torch.bfloat16, ignored=0.0)
    exact = with_gradients(
        lambda h, w: linear_cross_entropy(h, w, target), [hidden, weight], [torch.ones(())], Tensor.double
    )

    def error():
        call = partial(linear_cross_entropy, target=target, accumulate_float32=True)
        return (with_gradients(call, [hidden, weight], [torch.ones(())])[-1].double() - exact[-1]).norm()

    apart = error()
    plain, added = {"mm": torch.mm, "addmm": torch.addmm}, []

    def product(name, *matrices, out_dtype=None, out):
        if out_dtype is None:
            return plain[name](*matrices, out=out)
        assert out.dtype == out_dtype == torch.float32 and all(m.dtype == torch.bfloat16 for m in matrices[-2:])
        added.append(name)
        return plain[name](*(m.float() for m in matrices), out=out)

    for name in plain:
        monkeypatch.setattr(torch, name, partial(product, name))
    monkeypatch.setattr(linear_chunks, "_adds_in_float32", lambda x: True)
    assert error() < apart
    assert added == ["mm"] + ["addmm"] * 99


@pytest.mark.gpu
def test_accumulation_in_float32_on_a_gpu():
    """Not farther from float64 than products that are rounded before they are added."""
    (hidden, weight, _), target = inputs(4096, 256, 4000, torch.bfloat16, ignored=0.0)
    tensors, target = [hidden.cuda(), weight.cuda()], target.cuda()
    ones = [torch.ones((), device="cuda")]
    *_, exact = with_gradients(lambda h, w: linear_cross_entropy(h, w, target), tensors, ones, Tensor.double)
    errors = []
    for accumulate in (True, False):
        call = partial(linear_cross_entropy, target=target, accumulate_float32=accumulate, backend="triton")
        errors.append((with_gradients(call, tensors, ones)[-1].double() - exact).norm())
    assert errors[0] < errors[1]


def test_weights_in_float32(backend):
    """They are rounded to the dtype of hidden, and get their gradient in float32."""
    (hidden, weight, bias), target = inputs(21, 12, 50, torch.bfloat16)
    one = [torch.ones(())]
    wide = with_gradients(partial(loss_of, target=target, backend=backend), [hidden, weight.float(), bias.float()], one)
    same = with_gradients(partial(loss_of, target=target, backend=backend), [hidden, weight, bias], one)
    assert wide[2].dtype == wide[3].dtype == torch.float32
    for a, b in zip(wide, same, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=0)


def test_no_features_give_the_bias(backend):
    hidden, weight = torch.randn(4, 0, requires_grad=True), torch.randn(9, 0, requires_grad=True)
    bias, target = torch.randn(9, requires_grad=True), torch.arange(4)
    for options in ({}, {"reduction": "none"}):
        loss = linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend, **options)
        expected = torch.nn.functional.cross_entropy(bias.expand(4, 9), target, **options)
        torch.testing.assert_close(loss, expected)
        grads, right = (torch.autograd.grad(x.sum(), bias, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(grads, right)
        assert [g.shape for g in torch.autograd.grad(loss.sum(), (hidden, weight))] == [(4, 0), (9, 0)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(backend, reduction):
    """A frozen head, or a hidden state without gradient, and no gradient at all."""
    (hidden, weight, bias), target = inputs(10, 6, 20, torch.float32)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    full = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, reduction=reduction, backend=backend).sum(),
        [hidden, weight, bias], [torch.ones(())],
    )  # fmt: skip
    for i, wanted in enumerate(tensors):
        leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in tensors.items()}
        linear_cross_entropy(**leaves, target=target, reduction=reduction, backend=backend).sum().backward()
        assert all(t.grad is None for k, t in leaves.items() if k != wanted)
        torch.testing.assert_close(leaves[wanted].grad, full[1 + i])
    assert not linear_cross_entropy(**tensors, target=target, backend=backend).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    """Gradients are scaled into new memory: a graph that is kept may be used again, with another factor."""
    (hidden, weight, _), target = inputs(10, 6, 20, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    kept = [g.clone() for g in first]
    thrice = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, weight])
    for a, b, c, k in zip(first, thrice, again, kept, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, k)
        assert torch.equal(c, k)


def test_gradients_accumulate():
    (hidden, weight, _), target = inputs(10, 6, 20, torch.float32)
    leaf = weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, leaf, target)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_gives_zero_with_zero_gradients(backend, reduction):
    (hidden, weight, bias), target = inputs(10, 6, 20, torch.float32, ignored=2.0)
    loss, *grads = with_gradients(
        lambda *t: linear_cross_entropy(t[0], t[1], target, bias=t[2], reduction=reduction, backend=backend).sum(),
        [hidden, weight, bias], [torch.ones(())],
    )  # fmt: skip
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tokens(backend, shape, reduction):
    tensors, _ = inputs(1, 6, 20, torch.float32)
    hidden = torch.randn(*shape, 6)
    target = torch.zeros(shape, dtype=torch.long)
    leaves = [t.requires_grad_() for t in (hidden, tensors[1], tensors[2])]
    linear_cross_entropy(
        leaves[0], leaves[1], target, bias=leaves[2], reduction=reduction, backend=backend
    ).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in leaves)


def test_leading_dimensions_and_strides(backend):
    (hidden, weight, bias), target = inputs(24, 12, 30, torch.float32)
    hidden, target = hidden.view(4, 6, 12).transpose(0, 1), target.view(4, 6).t()
    for reduction in ("mean", "none"):
        options = {"bias": bias, "reduction": reduction, "backend": backend}
        got = linear_cross_entropy(hidden, weight.t().contiguous().t(), target, **options)
        expected = F.cross_entropy(
            F.linear(hidden, weight, bias).flatten(0, 1), target.flatten(), reduction=reduction
        ).view(got.shape)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_targets(backend, reduction):
    """Every other element of a tensor, which reshape leaves strided; the others would be out of range."""
    tensors, target = inputs(21, 12, 30, torch.float32)
    apart = torch.stack([target, torch.full_like(target, 2**40)], -1)[:, 0]
    grads = [torch.rand(target.shape if reduction == "none" else ())]
    got, expected = (
        with_gradients(partial(loss_of, target=t, reduction=reduction, backend=backend), tensors, grads)
        for t in (apart, target)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast(backend):
    (hidden, weight, bias), target = inputs(21, 12, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(
            partial(loss_of, target=target, backend=backend), [hidden, weight, bias], [torch.ones(())]
        )
    plain = with_gradients(
        partial(loss_of, target=target, backend=backend), [hidden.bfloat16(), weight, bias], [torch.ones(())]
    )
    assert torch.equal(cast[0], plain[0])
    for a, b in zip(cast[1:], plain[1:], strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.to(b.dtype), b)  # a gradient of float32 may be rounded less


def test_float16_survives_a_loss_scale():
    """With reduction "mean" the gradient of a logit is below float16's smallest number, but for the loss scale."""
    (hidden, weight, _), target = inputs(4096, 8, 300, torch.float16, ignored=0.0)
    leaf = hidden.clone().requires_grad_()
    (2.0**16 * linear_cross_entropy(leaf, weight, target)).backward()
    wide = hidden.double().requires_grad_()
    linear_cross_entropy(wide, weight.double(), target).backward()
    torch.testing.assert_close(leaf.grad.double() / 2**16, wide.grad, rtol=2e-2, atol=2e-7)


def test_memory_is_a_chunk(monkeypatch):
    """The kernels see one buffer of eight tokens' logits, again and again."""
    from fastllm.kernels.loss import native

    forward, seen = native.cross_entropy_forward, set()

    def spy(logits, *rest):
        seen.add((logits.data_ptr(), logits.shape[0]))
        forward(logits, *rest)

    monkeypatch.setattr(native, "cross_entropy_forward", spy)
    (hidden, weight, bias), target = inputs(66, 4, 1000, torch.float32)
    linear_cross_entropy(hidden, weight, target, bias=bias)
    assert len({address for address, _ in seen}) == 1
    assert {rows for _, rows in seen} == {8, 2}


def test_chunk_size_is_as_documented():
    for tokens, expected in [(0, 1), (1, 1), (255, 255), (300, 256), (2048, 416), (8192, 1648), (10**6, 2048)]:
        assert CHUNK_SIZE(tokens) == expected


BAD = {
    "weight's shape": (lambda h, w, t: linear_cross_entropy(h, w.t(), t), ValueError, "weight must have shape"),
    "weight's dims": (lambda h, w, t: linear_cross_entropy(h, w[0], t), ValueError, r"must be \[classes, features\]"),
    "weight's dtype": (lambda h, w, t: linear_cross_entropy(h, w.half(), t), TypeError, "weight is float16 but hidden"),
    "weight elsewhere": (lambda h, w, t: linear_cross_entropy(h, w.to("meta"), t), ValueError, "weight is on meta"),
    "no classes": (lambda h, w, t: linear_cross_entropy(h, w[:0], t), ValueError, "there are no classes"),
    "bias": (lambda h, w, t: linear_cross_entropy(h, w, t, bias=w[0]), ValueError, "bias must have shape"),
    "class weights": (
        lambda h, w, t: linear_cross_entropy(h, w, t, class_weight=w[0]), ValueError, "class_weight must have shape",
    ),
    "target's shape": (lambda h, w, t: linear_cross_entropy(h, w, t[:1]), ValueError, "target must have shape"),
    "target's dtype": (lambda h, w, t: linear_log_prob(h, w, t.float()), TypeError, "target must be int64 or int32"),
    "target's range": (lambda h, w, t: linear_log_prob(h, w, t + 20), IndexError, "neither in"),
    "reduction": (lambda h, w, t: linear_cross_entropy(h, w, t, reduction="max"), ValueError, "reduction must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("preferred", ["cpu", "triton", "cuda"])
def test_bad_input(simt, case, preferred):
    bad, error, message = BAD[case]
    with use_backend(preferred), pytest.raises(error, match=message):
        bad(torch.randn(4, 6), torch.randn(20, 6), torch.randint(1, 20, (4,)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction):
    (hidden, weight, _), target = inputs(10, 6, 20, torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: its kernels have no second derivative"):
        grad.sum().backward()


def test_opcheck():
    tensors, target = inputs(10, 6, 20, torch.float32)
    tensors = (*tensors, target, None, None)
    options = (IGNORE, 0.1, 0.0, 0.0, 0.7, 0, 20)
    ops = torch.ops.fastllm
    for with_entropy in (False, True):
        torch.library.opcheck(ops.linear_cross_entropy_forward, (*tensors, *options, with_entropy, "cpu"))
    wanted = (True, True, False, False)
    torch.library.opcheck(ops.linear_cross_entropy_with_gradients, (*tensors, torch.ones(()), *wanted, *options, "cpu"))
    _, lse, entropy = ops.linear_cross_entropy_forward(*tensors, *options, True, "cpu")
    upstream = (torch.ones(10), None, torch.ones(10), entropy)
    args = (*tensors, lse, *upstream, *wanted, *options, "cpu")
    torch.library.opcheck(ops.linear_cross_entropy_backward, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(backend, dynamic, reduction):
    """One graph; the same numbers as without compile, with ignored targets too."""
    torch._dynamo.reset()

    def layer(h, w, b, target):
        return 2 * linear_cross_entropy(h * 2, w, target, bias=b, reduction=reduction, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 13):
        tensors, target = inputs(tokens, 6, 20, torch.float32, ignored=0.5)
        grads = [torch.ones(target.shape if reduction == "none" else ())]
        for got, expected in zip(
            with_gradients(partial(compiled, target=target), tensors, grads),
            with_gradients(partial(layer, target=target), tensors, grads),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_module_has_torchs_parameters():
    weight = torch.rand(20)
    head = LinearCrossEntropyLoss(6, 20, bias=True, weight=weight, label_smoothing=0.1, ignore_index=2)
    assert {k: list(v.shape) for k, v in head.state_dict().items()} == {
        "linear.weight": [20, 6], "linear.bias": [20], "weight": [20],
    }  # fmt: skip
    hidden, target = torch.randn(3, 5, 6), torch.randint(20, (3, 5))
    logits = F.linear(hidden, head.linear.weight, head.linear.bias).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), weight=weight, label_smoothing=0.1, ignore_index=2)
    torch.testing.assert_close(head(hidden, target), expected)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="came with PyTorch 2.13")
def test_module_loads_torchs():
    options = {"bias": True, "weight": torch.rand(20), "label_smoothing": 0.1}
    ours, theirs = LinearCrossEntropyLoss(6, 20, **options), torch.nn.LinearCrossEntropyLoss(6, 20, **options)
    ours.load_state_dict(theirs.state_dict())
    hidden, target = torch.randn(15, 6), torch.randint(20, (15,))
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["mean", "none"])
def test_on_a_gpu(backend_on_gpu, dtype, way):
    """Like PyTorch's own, by the norm of the error."""
    (hidden, weight, bias), target = inputs(1000, 256, 32000, dtype)
    tensors, target = [t.cuda() for t in (hidden, weight, bias)], target.cuda()
    grads = [torch.ones(target.shape if way == "none" else (), device="cuda")]
    run = partial(loss_of, target=target, reduction=way)
    exact = with_gradients(partial(run, backend="torch"), tensors, grads, Tensor.double)
    eager = with_gradients(partial(run, backend="torch"), tensors, grads)
    actual = with_gradients(partial(run, backend=backend_on_gpu), tensors, grads)
    for a, b, c in zip(actual, eager, exact, strict=True):
        rounding = torch.finfo(a.dtype).eps * c.norm()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
def test_no_host_sync_on_a_gpu(backend_on_gpu):
    (hidden, weight, _), target = inputs(300, 64, 1000, torch.bfloat16)
    hidden, weight, target = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_(), target.cuda()
    linear_cross_entropy(hidden, weight, target, backend=backend_on_gpu).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, target, backend=backend_on_gpu).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
