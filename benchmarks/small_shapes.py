"""Every GPU kernel on small shapes that reach its branches, each held against float64 on its own.

    python -m benchmarks.small_shapes --out DIR    in child processes; writes small_shapes.md
    python -m benchmarks.small_shapes --here       the kernels alone, in this process: for compute-sanitizer

An error of one shape, even one that breaks the CUDA context, hides no other: a new process takes up behind it. The
verdict on numbers is the rule of accuracy.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.files import write_atomic
from fastllm.kernels import (
    backends,
    cross_entropy,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    linear_jsd,
    linear_log_prob,
    pack_weight,
    packed_linear,
    rms_norm,
    rope,
    rope_append,
    softmax,
    swiglu,
)
from fastllm.kernels.attention import reference
from fastllm.kernels.attention.options import bounds

from . import apart
from .accuracy import Probe, compare, results
from .losses import eager_entropy, eager_head, eager_log_prob
from .pointwise import eager_swiglu
from .targets import specialized_attention
from .timing import DEVICE

GPU_BACKENDS = ("cuda", "triton")
PATIENCE = 30.0  # seconds for one shape, its compilation included
WORKERS = 14
Shape = tuple[str, torch.dtype, Callable[[], Probe]]  # its name, which begins with the op's


def jobs(kernels: Sequence[str] = GPU_BACKENDS, *, check: bool = True) -> dict[str, Callable[[], None]]:
    """By name, "triton softmax 64 causal": what runs a shape, and raises where the result is wrong."""
    found: dict[str, Callable[[], None]] = {}

    def add(shapes: Iterable[Shape], kernels: Sequence[str]) -> None:
        for name, dtype, build in shapes:
            for backend in kernels:
                if backend in backends.OPS[name.split()[0]].kernels:
                    found[f"{backend} {name}"] = partial(_run, build, dtype, backend, check)

    # First: compute-sanitizer, whose time ends before the shapes do, should meet what is hardest to get right.
    add(_attention_dims(), [backend for backend in kernels if backend != "triton"])  # which compiles each for a second
    add(_attention(), kernels)
    if "triton" in kernels:
        found |= {f"triton {name} specialised": job for name, job in _specialized(check)}
    for family in (_rms_norm, _softmax, _cross_entropy, _heads, _jsd, _packed_linear, _rope, _rope_append, _swiglu):
        add(family(), kernels)
    add(_paged(), [backend for backend in kernels if backend != "cuda"])  # which reads no pages
    for backend in kernels:
        found[f"{backend} cross_entropy out of range"] = partial(_target_out_of_range, backend)
        found[f"{backend} rope out of range"] = partial(_position_out_of_range, backend)
    return found


def _run(build: Callable[[], Probe], dtype: torch.dtype, backend: str, check: bool) -> None:
    torch.manual_seed(0)
    probe = build()
    inputs = [t.to(DEVICE, dtype) for t in probe.inputs.values()]
    ours = results(probe, partial(probe.call, backend=backend), inputs)
    if not check:
        return
    exact = results(probe, partial(probe.call, backend="torch"), inputs, torch.float64)
    eager = results(probe, probe.eager, inputs)
    wrong = []
    for name in exact:
        error, own, within = compare(ours[name], eager[name], exact[name], probe.terms)
        if not within:
            wrong.append(f"{name} {error:.1e}, PyTorch's {own:.1e}")
    if wrong:
        raise AssertionError(f"errors beyond the rule: {'; '.join(wrong)}")


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


# ---- the shapes ----


def _rms_norm() -> Iterator[Shape]:
    def eager(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h

    def call(x: Tensor, weight: Tensor, residual: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual=residual, **options)

    def build(cols: int) -> Probe:
        inputs = {"x": _normal(9, cols), "weight": _normal(cols), "residual": _normal(9, cols)}
        return Probe(rms_norm, eager, call, inputs)

    for cols in (1, 64, 100, 1024, 4096, 16384, 65544, 262144):
        yield f"rms_norm {cols}", torch.bfloat16, partial(build, cols)


def _softmax() -> Iterator[Shape]:
    def build(cols: int, causal: bool, kind: str) -> Probe:
        bias = _normal(2, 1, cols)
        mask = {"": None, "added": bias, "boolean": bias > 0}[kind]

        def eager(x: Tensor) -> Tensor:
            seen = torch.ones(5, cols, dtype=torch.bool, device=x.device).tril(cols - 5 if causal else cols)
            seen = seen & mask if kind == "boolean" else seen
            scores = x + mask.to(x.dtype) if kind == "added" else x
            return _softmax_of_seen(scores, seen)

        call = partial(softmax, causal=causal, mask=mask)
        return Probe(softmax, eager, call, {"x": _normal(2, 5, cols)})

    for cols in (1, 64, 100, 1024, 4096, 16384, 65544, 131073, 262144):
        for causal, kind in ((False, ""), (True, ""), (False, "added"), (True, "boolean")):
            name = f"softmax {cols}{' causal' * causal}{f', {kind} mask' if kind else ''}"
            yield name, torch.bfloat16, partial(build, cols, causal, kind)


def _softmax_of_seen(scores: Tensor, seen: Tensor) -> Tensor:
    """Zeros for a row that sees nothing."""
    none = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & ~none, float("-inf")).softmax(-1).masked_fill(none, 0.0)


def _cross_entropy() -> Iterator[Shape]:
    def build(classes: int, weighted: bool, label_smoothing: float, z_loss: float, softcap: float) -> Probe:
        target = torch.arange(9, device=DEVICE) % classes
        target[::3] = -100
        weight = torch.rand(classes, device=DEVICE) if weighted else None

        def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
            scores = softcap * torch.tanh(logits / softcap) if softcap else logits
            shares = None if weight is None else weight.to(logits.dtype)
            loss = F.cross_entropy(scores, target, shares, label_smoothing=label_smoothing)
            lse = torch.logsumexp(scores, -1)
            return loss + z_loss * lse[target >= 0].square().mean(), lse

        def call(logits: Tensor, **options: Any) -> Any:
            given = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
            return cross_entropy(logits, target, weight=weight, return_lse=True, **given, **options)

        logits = _normal(9, classes)
        return Probe(cross_entropy, eager, call, {"logits": logits}, terms=float(logits.abs().max()))

    for classes in (1, 64, 100, 1024, 32000, 131072, 131073):
        for name, *options in (("", False, 0, 0, 0), (" smooth", False, 0.1, 0, 0), (" all", True, 0.1, 1e-3, 5.0)):
            yield f"cross_entropy {classes}{name}", torch.bfloat16, partial(build, classes, *options)


def _heads() -> Iterator[Shape]:
    def build(op: Callable, eager: Callable, given: dict[str, Any]) -> Probe:
        target = torch.arange(300, device=DEVICE)
        inputs = {"hidden": _normal(300, 64), "weight": 0.2 * _normal(1000, 64)}
        call = partial(op, **given)
        return Probe(op, lambda h, w: eager(h, w, target), lambda h, w, **o: call(h, w, target, **o), inputs)

    def hot(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return eager_entropy(2 * hidden, weight, target)

    for name, op, eager, given in (
        ("linear_cross_entropy", linear_cross_entropy, eager_head, {}),
        ("linear_log_prob", linear_log_prob, eager_log_prob, {}),
        ("linear_log_prob entropy", linear_log_prob, hot, {"temperature": 0.5, "return_entropy": True}),
    ):
        yield name, torch.bfloat16, partial(build, op, eager, given)


def _jsd() -> Iterator[Shape]:
    def build(classes: int, beta: float) -> Probe:
        mask, temperature = torch.arange(9, device=DEVICE) % 3 > 0, 1.5
        teacher = _normal(9, 8), _normal(classes, 8)

        def call(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
            given = {"mask": mask, "beta": beta, "temperature": temperature}
            return linear_jsd(hidden, weight, *(t.to(hidden.dtype) for t in teacher), **given, **options)

        inputs = {"hidden": _normal(9, 16), "weight": 0.5 * _normal(classes, 16)}
        return Probe(linear_jsd, partial(call, backend="torch"), call, inputs)

    for classes, beta in itertools.product((1, 64, 100, 32000, 131073), (0.0, 0.3, 1.0)):
        yield f"linear_jsd {classes} beta {beta}", torch.bfloat16, partial(build, classes, beta)


def _packed_linear() -> Iterator[Shape]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "torch") -> Tensor:
        if x.dtype == torch.float64:  # no weight is packed in it
            return F.linear(x, weight, bias)
        return packed_linear(x, pack_weight(weight), bias, backend=backend)

    def build(rows: int, cols: int, features: int) -> Probe:
        inputs = {"x": _normal(rows, cols), "weight": _normal(features, cols), "bias": _normal(features)}
        return Probe(packed_linear, F.linear, call, inputs, backward=False)

    for rows, cols, features in ((1, 1, 1), (3, 577, 33), (70, 128, 200)):
        yield f"packed_linear {rows}×{cols}×{features}", torch.bfloat16, partial(build, rows, cols, features)


def _rope() -> Iterator[Shape]:
    def build(dim: int, rotary: int, interleaved: bool) -> Probe:
        angle = _normal(9, rotary // 2)
        positions = torch.arange(18, device=DEVICE).view(2, 9) % 9

        def call(q: Tensor, k: Tensor, backend: str = "torch") -> tuple[Tensor, Tensor]:
            cos, sin = (t.to(torch.promote_types(q.dtype, torch.float32)) for t in (angle.cos(), angle.sin()))
            return rope(q, k, cos, sin, interleaved=interleaved, positions=positions, backend=backend)

        return Probe(rope, call, call, {"q": _normal(2, 9, 7, dim), "k": _normal(2, 9, 1, dim)})

    for dim, rotary in ((128, 128), (80, 40), (5, 2)):
        for interleaved in (False, True):
            yield f"rope {dim}{' interleaved' * interleaved}", torch.float32, partial(build, dim, rotary, interleaved)


def _rope_append() -> Iterator[Shape]:
    def build(dim: int, rotary: int, interleaved: bool) -> Probe:
        angle, positions = 100 * _normal(9, rotary // 2), torch.arange(9, device=DEVICE)
        slots = 47 - 5 * positions
        slots[4] = -1

        def call(q: Tensor, k: Tensor, v: Tensor, backend: str = "torch") -> tuple[Tensor, ...]:
            caches = [k.new_zeros(3, 16, *k.shape[1:]) for _ in range(2)]
            tables = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
            turned = rope_append(q, k, v, *tables, positions, *caches, slots, interleaved=interleaved, backend=backend)
            return turned, *caches

        inputs = {"q": _normal(9, 7, dim), "k": _normal(9, 2, dim), "v": _normal(9, 2, dim)}
        return Probe(rope_append, call, call, inputs, backward=False)

    for dim, rotary in ((64, 64), (80, 40)):
        for interleaved in (False, True):
            name = f"rope_append {dim}{' interleaved' * interleaved}"
            yield name, torch.float32, partial(build, dim, rotary, interleaved)


def _swiglu() -> Iterator[Shape]:
    for cols in (1, 100, 4104):
        inputs = partial(lambda cols: {"gate": _normal(5, cols), "up": _normal(5, cols)}, cols)
        yield f"swiglu {cols}", torch.float32, lambda inputs=inputs: Probe(swiglu, eager_swiglu, swiglu, inputs())


def _attention() -> Iterator[Shape]:
    for shape in ((1, 1, 8), (200, 300, 64), (300, 200, 128)):
        size = "×".join(map(str, shape))
        yield f"flash_attention {size}", torch.bfloat16, partial(_plain, *shape)
        yield f"flash_attention {size} packed, window, softcap, sinks", torch.bfloat16, partial(_packed, *shape)
        yield f"flash_decode {size}", torch.bfloat16, partial(_decode, *shape)


def _attention_dims() -> Iterator[Shape]:
    """Each head dimension that CUDA C++ is compiled for, and two that it pads, 75 in a copy. Dtypes take turns."""
    dtypes = itertools.cycle((torch.bfloat16, torch.float16))
    for dim in (64, 128, 96, 192, 256, 40, 75):
        shape, full = (70, 150, dim), {"causal": False, "sinks": True, "lse": True}
        yield f"flash_attention 70×150×{dim} lse", next(dtypes), partial(_plain, *shape, lse=True)
        yield f"flash_attention 70×150×{dim} full, sinks, lse", next(dtypes), partial(_plain, *shape, **full)
        yield f"flash_attention 70×150×{dim} packed, window, softcap, sinks", next(dtypes), partial(_packed, *shape)
        yield f"flash_decode 1×60×{dim} a split", next(dtypes), partial(_decode, 1, 60, dim)
        yield f"flash_decode 2×600×{dim} splits", next(dtypes), partial(_decode, 2, 600, dim)


def _specialized(check: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The warp-specialised kernels, where this GPU runs them."""
    from fastllm.kernels.attention import triton_tuning

    if not triton_tuning.specialized("forward", triton_tuning.architecture(DEVICE), 64, False):
        return

    def job(build: Callable[[], Probe], softcap: bool) -> None:
        with specialized_attention(softcap):
            _run(build, torch.bfloat16, "triton", check)

    for shape in ((4, 4, 8), (200, 300, 64), (300, 200, 128), (130, 260, 256)):
        name = f"flash_attention {'×'.join(map(str, shape))}"
        yield name, partial(job, partial(_plain, *shape), False)
        yield f"{name} packed, window, softcap, sinks", partial(job, partial(_packed, *shape), True)


def _qkv(seq_q: int, seq_k: int, dim: int) -> dict[str, Tensor]:
    return {"q": _normal(2, seq_q, 4, dim), "k": _normal(2, seq_k, 2, dim), "v": _normal(2, seq_k, 2, dim)}


def _plain(seq_q: int, seq_k: int, dim: int, causal: bool = True, sinks: bool = False, lse: bool = False) -> Probe:
    seen = reference._visible(seq_q, seq_k, *bounds("small_shapes", causal, None), DEVICE)
    inputs = _qkv(seq_q, seq_k, dim) | ({"sinks": _normal(4)} if sinks else {})

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> Any:
        return flash_attention(q, k, v, causal=causal, sinks=sinks, return_lse=lse, **options)

    def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
        return _eager(q, k, v, seen, 0.0, sinks)[: 2 if lse else 1]

    return Probe(flash_attention, eager, call, inputs)


def _packed(seq_q: int, seq_k: int, dim: int) -> Probe:
    ends = [torch.tensor([0, n // 3, n], device=DEVICE) for n in (2 * seq_q, 2 * seq_k)]
    inputs = {name: t.flatten(0, 1) for name, t in _qkv(seq_q, seq_k, dim).items()} | {"sinks": _normal(4)}
    seen = reference._visible_packed(*ends, 2 * seq_q, 2 * seq_k, 69, 0)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Any:
        more = {"window": 70, "softcap": 5.0, "sinks": sinks, "return_lse": True}
        return flash_attention(q, k, v, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **more, **options)

    def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _eager(*(t.unsqueeze(0) for t in (q, k, v)), seen, 5.0, sinks)
        return out.squeeze(0), lse.squeeze(0)

    return Probe(flash_attention, eager, call, inputs)


def _decode(seq_q: int, seq_k: int, dim: int) -> Probe:
    lengths = torch.tensor([seq_k, 0], device=DEVICE)
    inputs = _qkv(min(seq_q, 2), seq_k, dim)
    new = inputs["q"].shape[1]
    at = torch.arange(seq_k, device=DEVICE)
    seen = at <= (lengths.view(2, 1, 1, 1) - new + torch.arange(new, device=DEVICE).unsqueeze(1))
    call = partial(flash_decode, cache_seqlens=lengths)
    return Probe(flash_decode, lambda q, k, v: _eager(q, k, v, seen)[0], call, inputs, backward=False)


def _paged() -> Iterator[Shape]:
    for seq_q, seq_k, dim in ((1, 60, 64), (2, 1200, 128), (20, 700, 40)):
        size = f"{seq_q}×{seq_k}×{dim}"
        yield f"flash_decode {size} in pages", torch.bfloat16, partial(_decode_in_pages, seq_q, seq_k, dim)


def _decode_in_pages(seq_q: int, seq_k: int, dim: int) -> Probe:
    columns = -(-seq_k // 16)
    lengths, table = torch.tensor([seq_k, seq_q], device=DEVICE), torch.randperm(2 * columns, device=DEVICE)
    table, at = table.view(2, columns), torch.arange(16 * columns, device=DEVICE)
    seen = at <= (lengths.view(2, 1, 1, 1) - seq_q + torch.arange(seq_q, device=DEVICE).unsqueeze(1))
    inputs = {"q": _normal(2, seq_q, 4, dim), **{x: _normal(2 * columns, 16, 2, dim) for x in "kv"}}

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _eager(q, *(x[table].flatten(1, 2) for x in (k, v)), seen)[0]

    call = partial(flash_decode, cache_seqlens=lengths, block_table=table)
    return Probe(flash_decode, eager, call, inputs, backward=False)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float = 0.0, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of scores in the dtype; ``seen`` broadcasts to [batch, heads, seq_q, seq_k]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = seen.expand(scores.shape)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        seen = F.pad(seen, (0, 1), value=True)
    lse = torch.logsumexp(scores.masked_fill(~seen, float("-inf")), -1)
    return (_softmax_of_seen(scores, seen)[..., : v.shape[2]] @ v).transpose(1, 2), lse


def _target_out_of_range(backend: str) -> None:
    """That row is NaN, and nothing is read there."""
    logits = _normal(5, 30).requires_grad_()
    target = torch.arange(5, device=DEVICE)
    target[3] = 2**40
    loss = cross_entropy(logits, target, reduction="none", backend=backend)
    loss.sum().backward()
    nan = loss.isnan().tolist(), logits.grad.isnan().any(-1).tolist()
    if nan != ([False, False, False, True, False],) * 2:
        raise AssertionError(f"NaN in the rows {nan} and not in the fourth alone")


def _position_out_of_range(backend: str) -> None:
    q, k, angle = _normal(2, 9, 7, 80), _normal(2, 9, 1, 80), _normal(9, 20)
    positions = torch.arange(18, device=DEVICE).view(2, 9) - 2
    outside = (positions < 0) | (positions >= 9)
    for out in rope(q, k, angle.cos(), angle.sin(), positions=positions, backend=backend):
        if not torch.equal(out.isnan().flatten(2).any(-1), outside):
            raise AssertionError("not the tokens outside the tables are NaN")


# ---- the command ----


def table(outcomes: Sequence[apart.Outcome]) -> str:
    lines = ["| shape | verdict | seconds | |", "|---|---|---:|---|"]
    for o in outcomes:
        lines.append(
            f"| {o.name} | {'FAILED' if o.error else 'passed'} | {o.seconds:.1f} | {o.error.replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


def supervise(command: Sequence[str], names: Sequence[str], out: Path | None) -> int:
    """Runs the jobs in children, prints what fails and writes all of it."""
    began, outcomes = time.monotonic(), []
    try:
        for outcome in apart.run_all(apart.shares(names, WORKERS), command, PATIENCE):
            outcomes.append(outcome)
            if outcome.error:
                print(f"FAILED  {outcome.name}: {outcome.error}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    missing = [name for name in names if name not in {o.name for o in outcomes}]
    outcomes += [apart.Outcome(name, "not run: no time left") for name in missing]
    outcomes.sort(key=lambda o: names.index(o.name))
    if out is not None:
        write_atomic(out / "small_shapes.md", table(outcomes).encode())
    failed = sum(bool(o.error) for o in outcomes)
    print(f"{len(names) - failed} of {len(names)} small shapes passed, {failed - len(missing)} failed, "
          f"{len(missing)} not run, in {time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.small_shapes", description=head, epilog=rest,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where small_shapes.md goes")
    parser.add_argument("--here", action="store_true", help="in this process, without the references")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="these, in this process, a line of JSON each")
    arguments = parser.parse_args(argv)
    if arguments.jobs:
        return apart.work(jobs(), arguments.jobs)
    if arguments.here:
        for name, job in jobs(check=False).items():
            print(name, flush=True)
            job()
            torch.cuda.synchronize()
        print("every kernel ran")
        return 0
    return supervise([sys.executable, "-m", "benchmarks.small_shapes", "--jobs"], list(jobs()), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
