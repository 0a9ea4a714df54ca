from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from fastllm.kernels import linear_log_prob
from fastllm.kernels.loss import linear_chunks, reference
from tests.numerics import DTYPES, assert_accurate, long_row

from .log_prob_checks import IGNORE, inputs, run, terms, upstream

CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter, on small inputs; and to the GPU's kernels logits in the dtype of hidden."""
    monkeypatch.setattr(linear_chunks, "chunk_size", lambda tokens: min(max(tokens, 1), CHUNK))
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") in ("triton", "cuda"):
        monkeypatch.setattr(linear_chunks, "_product_dtype", lambda hidden: hidden.dtype)


def check(tensors: list[Tensor], way: str, backend: str, **options: float) -> None:
    """Outputs and gradients by the rule for numerics."""
    grads = upstream(tensors[3], way)
    exact = run(tensors, grads, way, torch.float64, backend="torch", **options)
    eager, actual = (run(tensors, grads, way, backend=b, **options) for b in ("torch", backend))
    known = terms(tensors, grads, CHUNK, **options)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_accurate(actual[name], eager[name], exact[name], name, known[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("way", ["log_prob", "entropy", "both"])
def test_accuracy(backend, way, temperature, softcap, dtype):
    check(inputs(21, 12, 100, dtype), way, backend, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("classes", [1, 2, 17, 4099])
def test_sizes(backend, classes):
    check(inputs(11, 5, classes, torch.float32), "both", backend, temperature=0.8)


def of_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A hidden and a weight whose logits these are."""
    return torch.eye(len(logits), dtype=logits.dtype), logits.t()


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
@pytest.mark.parametrize("classes", [8192, 50257])
def test_large_vocabularies(backend, classes, order):
    classes = long_row(backend, classes)
    logits = 8 * torch.randn(3, classes)
    if order != "mixed":
        logits = logits.sort(descending=order == "falling").values  # the maximum moves at every step, or never
    target = torch.tensor([0, classes - 1, classes // 2])
    check([*of_logits(logits), torch.zeros(classes), target], "both", backend)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_classes_that_are_ruled_out(backend, temperature):
    """Of probability exactly 0, by -inf or by a wide margin, in front and behind: as if they were not there."""
    classes = long_row(backend, 9000)
    tensors = inputs(5, 6, classes, torch.float32)
    in_play = slice(classes - 300, classes - 100)
    tensors[3] = torch.randint(in_play.start, in_play.stop, (5,))
    grads = upstream(tensors[3], "both")
    fewer = [tensors[0], *(x[in_play] for x in tensors[1:3]), tensors[3] - in_play.start]
    expected = run(fewer, grads, "both", backend=backend, temperature=temperature)
    for low in (float("-inf"), -1000.0):
        bias = torch.full_like(tensors[2], low)
        bias[in_play] = tensors[2][in_play]
        got = run([*tensors[:2], bias, tensors[3]], grads, "both", backend=backend, temperature=temperature)
        for name in ("dweight", "dbias"):
            outside = got[name].clone()
            outside[in_play] = 0
            assert torch.equal(outside, torch.zeros_like(outside))
            got[name] = got[name][in_play]
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x)


def test_entropy_of_what_is_known(any_backend):
    """All alike: log(classes); one alone: 0; two alike: log 2. In nats, and without a gradient but for the rounding
    of lse."""
    logits = torch.zeros(3, 64)
    logits[1, 5], logits[2, 7:9] = 200.0, 200.0
    bias, target = torch.zeros(64, requires_grad=True), torch.zeros(3).long()
    _, entropy = linear_log_prob(*of_logits(logits), target, bias=bias, return_entropy=True, backend=any_backend)
    torch.testing.assert_close(entropy, torch.tensor([math.log(64), 0.0, math.log(2)]))
    entropy.sum().backward()
    assert bias.grad.abs().max() <= 200 * torch.finfo(torch.float32).eps


def test_temperature_divides_capped_logits(any_backend):
    hidden, weight, bias, target = inputs(9, 6, 40, torch.float32, ignored=0.0)
    capped = 2.0 * torch.tanh((hidden @ weight.t() + bias) / 2.0)
    expected = (capped / 0.7).log_softmax(-1)
    got, entropy = linear_log_prob(
        hidden, weight, target, bias=bias, softcap=2.0, temperature=0.7, return_entropy=True, backend=any_backend
    )
    torch.testing.assert_close(got, expected.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=expected).entropy())


def test_ignored_tokens_give_0_without_a_gradient(any_backend):
    hidden, weight, _, target = inputs(20, 8, 30, torch.float32, ignored=0.5)
    target[:2] = torch.tensor([IGNORE, 8])
    target.clamp_(max=28)
    hidden.requires_grad_()
    valid = target != IGNORE
    options = {"temperature": 0.7, "return_entropy": True, "backend": any_backend}
    out = linear_log_prob(hidden, weight, target, **options)
    expected = linear_log_prob(hidden[valid], weight, target[valid], **options)
    for x, y in zip(out, expected, strict=True):
        torch.testing.assert_close(x[valid], y)
        assert bool((x[~valid] == 0).all())
        (grad,) = torch.autograd.grad(x.sum(), hidden, retain_graph=True)
        assert bool((grad[~valid] == 0).all()) and bool((grad[valid] != 0).any(-1).all())
    same = linear_log_prob(hidden, weight, target.masked_fill(~valid, 29), ignore_index=29, **options)
    assert all(torch.equal(a, b) for a, b in zip(same, out, strict=True))


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_ignored_tokens_may_hold_anything(any_backend, odd):
    """A bias makes every logit of a class inf or NaN: with all tokens ignored nothing comes of it."""
    hidden, weight, bias, target = inputs(9, 6, 20, torch.float32, ignored=2.0)
    bias[3] = odd
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = linear_log_prob(hidden, weight, target, bias=bias, temperature=2.0, return_entropy=True, backend=any_backend)
    assert all(torch.equal(x, torch.zeros(9)) for x in out)
    (out[0] + out[1]).sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_nan_stays_in_its_row(any_backend):
    hidden, weight, _, target = inputs(9, 6, 20, torch.float32, ignored=0.0)
    hidden[4] = float("nan")
    log_prob, entropy = linear_log_prob(hidden, weight, target, return_entropy=True, backend=any_backend)
    for x in (log_prob, entropy):
        assert x.isnan().tolist() == [i == 4 for i in range(9)]


def test_the_entropy_changes_nothing_else(backend):
    tensors = inputs(21, 12, 100, torch.bfloat16)
    grads = upstream(tensors[3], "log_prob")
    alone = run(tensors, grads, "log_prob", backend=backend)
    beside = linear_log_prob(*tensors[:2], tensors[3], bias=tensors[2], return_entropy=True, backend=backend)
    assert torch.equal(beside[0], alone["log_prob"])


def test_leading_dimensions_and_strides(any_backend):
    hidden, weight, bias, target = inputs(24, 12, 30, torch.float32)
    options = {"temperature": 0.7, "return_entropy": True, "backend": any_backend}
    given = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    expected = linear_log_prob(given[0], given[1], target, bias=given[2], **options)
    odd = [
        hidden.view(4, 6, 12).transpose(0, 1).contiguous().transpose(0, 1),
        weight.t().contiguous().t(),
        torch.stack([bias, bias + 1], -1)[:, 0],
    ]
    odd = [x.detach().requires_grad_() for x in odd]
    spaced = torch.stack([target, torch.full_like(target, 2**40)], -1)[:, 0].view(4, 6)
    got = linear_log_prob(odd[0], odd[1], spaced, bias=odd[2], **options)
    above = torch.full((2, 24, 2), float("nan"))
    above[..., 0] = torch.randn(2, 24)
    torch.autograd.backward(expected, list(above[..., 0].contiguous()))
    torch.autograd.backward(got, [g.view(4, 6) for g in above[..., 0]])
    for a, b in zip((*got, *(x.grad for x in odd)), (*expected, *(x.grad for x in given)), strict=True):
        torch.testing.assert_close(a, b.view(a.shape))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_tokens(any_backend, shape):
    _, weight, bias, _ = inputs(1, 6, 20, torch.float32)
    leaves = [x.requires_grad_() for x in (torch.randn(*shape, 6), weight, bias)]
    out = linear_log_prob(
        leaves[0], weight, torch.zeros(shape).long(), bias=bias, return_entropy=True, backend=any_backend
    )
    assert [x.shape for x in out] == [shape, shape]
    (out[0].sum() + out[1].sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def test_only_what_is_wanted(backend):
    """A frozen head, or a hidden state without gradient, and no gradient at all."""
    tensors = inputs(10, 6, 20, torch.float32)
    grads = upstream(tensors[3], "both")
    full = run(tensors, grads, "both", backend=backend)
    names = ("hidden", "weight", "bias")
    for wanted in names:
        leaves = {k: x.clone().requires_grad_(k == wanted) for k, x in zip(names, tensors, strict=False)}
        out = linear_log_prob(**leaves, target=tensors[3], return_entropy=True, backend=backend)
        torch.autograd.backward(out, grads)
        torch.testing.assert_close(leaves[wanted].grad, full[f"d{wanted}"])
    out = linear_log_prob(*tensors[:2], tensors[3], return_entropy=True, backend=backend)
    assert not any(x.requires_grad for x in out)


def test_specification():
    """The entropy is PyTorch's, and has a gradient beside a class of probability 0 too."""
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, IGNORE, 8])
    entropy = reference.entropy(logits, target, temperature=0.7, softcap=2.0)
    p = (2.0 * torch.tanh(logits / 2.0) / 0.7).softmax(-1)
    expected = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(entropy, expected.where(target != IGNORE, 0.0))
    for spec in (reference.log_prob, reference.entropy):
        assert torch.autograd.gradcheck(lambda x: spec(x, target, temperature=0.7, softcap=2.0), logits)  # noqa: B023 (called at once)
    ruled_out = logits.detach().index_fill(1, torch.tensor([1]), float("-inf")).requires_grad_()
    (grad,) = torch.autograd.grad(reference.entropy(ruled_out, target).sum(), ruled_out)
    assert bool((grad[:, 1] == 0).all()) and bool(grad.isfinite().all())


def test_double_backward_raises(backend):
    hidden, weight, _, target = inputs(10, 6, 20, torch.float32)
    hidden.requires_grad_()
    _, entropy = linear_log_prob(hidden, weight, target, return_entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(entropy.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="its kernels have no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["log_prob", "entropy", "both"])
def test_compile(backend, dynamic, way):
    """One graph; the same numbers as without compile, with ignored targets too."""
    torch._dynamo.reset()

    def layer(h, w, b, target):
        return linear_log_prob(
            h * 2, w, target, bias=b, temperature=0.7, return_entropy=way != "log_prob", backend=backend
        )

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (9, 13):
        *tensors, target = inputs(tokens, 6, 20, torch.float32, ignored=0.5)
        found = []
        for call in (compiled, layer):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out = call(*leaves, target)
            out = out if isinstance(out, tuple) else (out,)
            sum(x.square().sum() for x in (out[1:] if way == "entropy" else out)).backward()
            found.append([*out, *(x.grad for x in leaves)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_must_be_positive(any_backend, temperature):
    hidden, weight, _, target = inputs(4, 6, 20, torch.float32)
    with pytest.raises(ValueError, match="linear_log_prob: temperature must be a finite number above 0, not"):
        linear_log_prob(hidden, weight, target, temperature=temperature, backend=any_backend)


def test_temperature_must_be_a_number():
    hidden, weight, _, target = inputs(4, 6, 20, torch.float32)
    call = partial(linear_log_prob, hidden, weight, target)
    with pytest.raises(TypeError, match="temperature must be a number, not 'hot'"):
        call(temperature="hot")
    with pytest.raises(TypeError, match="temperature gets no gradient"):
        call(temperature=torch.ones((), requires_grad=True))
    assert torch.equal(call(temperature=2), call(temperature=torch.tensor(2.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_on_gpu", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(backend_on_gpu, dtype):
    """Like PyTorch's own, by the norm of the error."""
    tensors = inputs(1000, 256, 32000, dtype)
    grads = [g.cuda() for g in upstream(tensors[3], "both")]
    call = partial(run, [x.cuda() for x in tensors], grads, "both", temperature=0.7)
    exact, eager, actual = call(torch.float64, backend="torch"), call(backend="torch"), call(backend=backend_on_gpu)
    for name, c in exact.items():
        rounding = torch.finfo(actual[name].dtype).eps * c.norm()
        assert (actual[name].double() - c).norm() <= 2 * (eager[name].double() - c).norm() + rounding
