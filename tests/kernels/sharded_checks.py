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

from fastllm.kernels import LinearCrossEntropyLoss, RMSNorm, cross_entropy, linear_cross_entropy, linear_jsd

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
del CHECKS["equals_unsharded"]


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
