"""What two processes check together: imported by the processes that test_sharded.py starts."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastllm.kernels import (
    LinearCrossEntropyLoss,
    RMSNorm,
    cross_entropy,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
)
from fastllm.kernels.loss import sharded
from tests.numerics import assert_accurate

from . import log_prob_checks as log_prob

CLASSES = 80
OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "weight": True, "z_loss": 1e-2, "ignore_index": 3},
    {"weight": True, "label_smoothing": 0.1, "softcap": 3.0, "z_loss": 1e-3},
]


def inputs(classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """The same in every process: logits [4, 5, classes], targets, class weights."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(4, 5, classes, generator=generator)
    target = torch.randint(classes, (4, 5), generator=generator)
    target[1, 2] = -100
    target[0, :2] = torch.tensor([0, classes - 1])
    return logits, target, torch.rand(classes, generator=generator)


def with_gradient(call: Callable[[Tensor], tuple[Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss, lse = call(leaf)
    (loss.sum() + (lse * torch.linspace(-1, 1, lse.numel()).view_as(lse)).sum()).backward()
    return loss.detach(), lse.detach(), leaf.grad


def check_equals_unsharded(backend: str) -> None:
    logits, target, weight = inputs()
    each = CLASSES // dist.get_world_size()
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    for options in OPTIONS:
        options = options | ({"weight": weight} if options.get("weight") else {})
        options |= {"return_lse": True, "backend": backend}
        if "ignore_index" in options:
            target = target.masked_fill(target == -100, options["ignore_index"])
        whole = with_gradient(lambda x: cross_entropy(x, target, **options), logits)  # noqa: B023
        shard = with_gradient(
            lambda x: cross_entropy(x, target, group=dist.group.WORLD, **options),  # noqa: B023
            logits[..., mine],
        )
        for got, expected in zip(shard, (*whole[:2], whole[2][..., mine]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def check_group_on_kernels() -> None:
    check_equals_unsharded("cpu")


def check_group_on_pytorch() -> None:
    check_equals_unsharded("torch")


def check_bfloat16_in_place() -> None:
    logits, target, _ = inputs()
    each = CLASSES // dist.get_world_size()
    shard = logits[..., dist.get_rank() * each :][..., :each].bfloat16().contiguous()
    results = []
    for inplace in (False, True):
        leaf = shard.clone().requires_grad_()
        cross_entropy(leaf * 1, target, group=dist.group.WORLD, inplace_backward=inplace).backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


def check_dtensor() -> None:
    """Classes that the group's size does not divide."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target, _ = inputs(77)
    whole = with_gradient(lambda x: cross_entropy(x, target, return_lse=True), logits)
    leaf = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    loss, lse = cross_entropy(leaf, target, return_lse=True)
    (loss + (lse * torch.linspace(-1, 1, lse.numel()).view_as(lse)).sum()).backward()
    for got, expected in zip((loss, lse, leaf.grad.full_tensor()), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def check_compile() -> None:
    logits, target, _ = inputs()
    each = CLASSES // dist.get_world_size()
    shard = logits[..., dist.get_rank() * each :][..., :each]

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(x * 2, target, group=dist.group.WORLD, return_lse=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(with_gradient(compiled, shard), with_gradient(loss, shard), strict=True):
        torch.testing.assert_close(got, expected)


def check_errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target, _ = inputs()
    sharded, replicated = (distribute_tensor(logits, mesh, [p]) for p in (Shard(2), Replicate()))
    with pytest.raises(ValueError, match="a DTensor knows its group"):
        cross_entropy(sharded, target, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="must be sharded over the last dimension"):
        cross_entropy(replicated, target)
    with pytest.raises(ValueError, match="1 classes, 1 each, leave some of 2 processes none"):
        cross_entropy(distribute_tensor(logits[..., :1], mesh, [Shard(2)]), target)
    weight = distribute_tensor(torch.randn(CLASSES, 8), mesh, [Shard(0)])
    with pytest.raises(TypeError, match="call the op in the forward of the module that fully_shard wraps"):
        linear_cross_entropy(torch.randn(4, 5, 8), weight, target)
    with pytest.raises(TypeError, match="teacher_weight is a DTensor"):
        linear_jsd(torch.randn(4, 8), torch.randn(CLASSES, 8), torch.randn(4, 8), weight)


# ---- the head of linear_log_prob ----


LOG_PROB_OPTIONS = [("log_prob", {}), ("both", {"temperature": 0.7}), ("entropy", {"softcap": 3.0, "temperature": 1.5})]


def head(dtype: torch.dtype = torch.float32, classes: int = CLASSES) -> list[Tensor]:
    """The same in every process."""
    torch.manual_seed(classes)
    *tensors, target = log_prob.inputs(21, 12, classes, dtype)
    target[:2] = torch.tensor([0, classes - 1])
    return [*tensors, target]


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def check_log_prob(backend: str) -> None:
    """By the rule for numerics, whose PyTorch has the whole head."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        hidden, weight, bias, target = whole = head(dtype)
        for way, options in LOG_PROB_OPTIONS:
            grads = log_prob.upstream(target, way)
            exact = log_prob.run(whole, grads, way, torch.float64, backend="torch", **options)
            eager = log_prob.run(whole, grads, way, backend="torch", **options)
            shares = [hidden, mine(weight), mine(bias), target]
            got = log_prob.run(shares, grads, way, group=dist.group.WORLD, backend=backend, **options)
            known = log_prob.terms(whole, grads, len(target), ranks=dist.get_world_size(), **options)
            for name, x in got.items():
                expected = [y[name] for y in (eager, exact, known)]
                if name in ("dweight", "dbias"):
                    expected = [mine(y) for y in expected]
                assert_accurate(x, *expected[:2], f"{dtype} {way} {name}", expected[2])


def check_log_prob_on_kernels() -> None:
    check_log_prob("cpu")


def check_log_prob_on_pytorch() -> None:
    check_log_prob("torch")


def check_log_prob_of_dtensors() -> None:
    """Classes that the group's size does not divide."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for backend in ("cpu", "torch"):
        hidden, weight, bias, target = whole = head(classes=77)
        grads = log_prob.upstream(target, "both")
        exact = log_prob.run(whole, grads, "both", torch.float64, backend="torch", temperature=0.7)
        eager = log_prob.run(whole, grads, "both", backend="torch", temperature=0.7)
        known = log_prob.terms(whole, grads, len(target), ranks=dist.get_world_size(), temperature=0.7)
        leaves = [hidden, *(distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias))]
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = linear_log_prob(
            *leaves[:2], target, bias=leaves[2], temperature=0.7, return_entropy=True, backend=backend
        )
        torch.autograd.backward(out, grads)
        assert isinstance(leaves[1].grad, DTensor)
        found = [*out, leaves[0].grad, *(x.grad.full_tensor() for x in leaves[1:])]
        for name, x in zip(log_prob.NAMES, found, strict=True):
            assert_accurate(x.detach(), eager[name], exact[name], f"{backend} {name}", known[name])


def check_log_prob_of_classes_that_are_ruled_out() -> None:
    """All of one process's: their probability is 0, and their entropy counts nothing."""
    hidden, weight, bias, target = head()
    half = CLASSES // 2
    bias[half:], target = float("-inf"), target.clamp(max=half - 1)
    grads = log_prob.upstream(target, "both")
    expected = log_prob.run([hidden, weight[:half], bias[:half], target], grads, "both")
    got = log_prob.run([hidden, mine(weight), mine(bias), target], grads, "both", group=dist.group.WORLD)
    for name in ("log_prob", "entropy", "dhidden"):
        torch.testing.assert_close(got[name], expected[name])
    if dist.get_rank() == dist.get_world_size() - 1:
        assert torch.equal(got["dweight"], torch.zeros_like(got["dweight"]))


def check_log_prob_of_no_tokens() -> None:
    _, weight, bias, _ = head()
    leaves = [x.clone().requires_grad_() for x in (torch.randn(0, 12), mine(weight), mine(bias))]
    out = linear_log_prob(
        *leaves[:2], torch.zeros(0).long(), bias=leaves[2], return_entropy=True, group=dist.group.WORLD
    )
    assert [x.shape for x in out] == [(0,), (0,)]
    (out[0].sum() + out[1].sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def check_log_prob_compiles() -> None:
    hidden, weight, _, target = head()
    found = []

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_log_prob(h * 2, w, target, temperature=0.7, return_entropy=True, group=dist.group.WORLD)

    for call in (torch.compile(both, fullgraph=True, backend="aot_eager"), both):
        leaves = [x.clone().requires_grad_() for x in (hidden, mine(weight))]
        out = call(*leaves)
        (out[0].square().sum() + out[1].square().sum()).backward()
        found.append([*out, *(x.grad for x in leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def check_log_prob_errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight, bias, target = head()
    shards = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="linear_log_prob: a DTensor knows its group"):
        linear_log_prob(hidden, shards, target, group=dist.group.WORLD)
    for placement in (Replicate(), Shard(1)):
        with pytest.raises(ValueError, match="weight that is a DTensor must be sharded over the first dimension"):
            linear_log_prob(hidden, distribute_tensor(weight, mesh, [placement]), target)
    with pytest.raises(ValueError, match=r"bias must have shape \[40\], it has \[80\]"):
        linear_log_prob(hidden, mine(weight), target, bias=bias, group=dist.group.WORLD)
    with pytest.raises(IndexError, match=r"target holds 80, which is neither in \[0, 80\)"):
        linear_log_prob(hidden, shards, target + (target == 79))
    fully_shard(module := LinearCrossEntropyLoss(12, CLASSES))
    for backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match="target differs within the group"):
            linear_log_prob(hidden, module.linear.weight, target.roll(dist.get_rank()), backend=backend)


def check_log_prob_of_other_targets_is_nan() -> None:
    """Where nobody checks, as on a GPU: that token's results and gradients alone."""
    hidden, weight, _, target = head()
    target = target.clamp(min=0)
    target[3] = dist.get_rank()
    for backend in ("cpu", "torch"):
        leaf = hidden.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharded, "has_values", lambda: False)
            out = linear_log_prob(
                leaf, mine(weight), target, return_entropy=True, group=dist.group.WORLD, backend=backend
            )
        for x in out:
            assert x.isnan().nonzero().flatten().tolist() == [3]
        if backend == "cpu":
            (out[0] + out[1]).sum().backward()
            assert leaf.grad.isnan().all(-1).nonzero().flatten().tolist() == [3]


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(8)
        self.loss = LinearCrossEntropyLoss(8, CLASSES)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.norm(hidden), target)


def check_fully_shard() -> None:
    """Each process has half of the batch; loss and gradients are those of one process with all of it."""
    torch.manual_seed(0)
    whole, rank = Head(), dist.get_rank()
    hidden, target = torch.randn(4, 5, 8), torch.randint(CLASSES, (4, 5))
    sharded = copy.deepcopy(whole)
    fully_shard(sharded.loss)
    fully_shard(sharded)
    for _ in range(2):  # the second adds to the gradients of the first
        expected = whole(hidden, target)
        expected.backward()
        loss = sharded(hidden[2 * rank :][:2], target[2 * rank :][:2])
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / dist.get_world_size(), expected.detach())
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
del CHECKS["equals_unsharded"], CHECKS["log_prob"]


def run(rank: int, size: int, folder: str) -> None:
    """One process: runs every check and writes what went wrong into a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for name, check in CHECKS.items():
        try:
            check()
            found = ""
        except Exception:
            found = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(found)
        dist.barrier()
    dist.destroy_process_group()
