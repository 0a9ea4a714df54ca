"""Runs a kernel as Triton compiled it, at the last stage before LLVM (TTGIR), in numpy.

There warps are specialised: what each group of them does is a region of its own, which run here side by side and wait
for each other at mbarriers. Neither Triton's interpreter, which runs the source, nor a look at the machine code shows
whether the compiler cut rows in two rightly, gave each part its tiles, and waits for them.

- A copy by TMA lands when somebody waits for its barrier, and not before; shared memory is NaN until then.
- Threads of a group are one: what threads of a warp do to each other, layouts and swizzles are left to Triton.
- Sums are numpy's, in float32; bfloat16 and float16 are rounded where the code says so.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Env = dict[str, Any]
Run = Generator[None, None, Any]


@dataclass
class Op:
    name: str
    results: list[str]
    operands: list[str]
    text: str  # behind the name
    regions: list[Block] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)  # of each region

    def attribute(self, name: str) -> int:
        return int(_first(rf"\b{name} = (-?\d+)", self.text))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the result, where it is a tensor or lies in shared memory."""
        found = re.findall(r"(?:tensor|memdesc|tensordesc)<((?:\d+x)+)", self.text.rsplit("->")[-1])
        return tuple(map(int, found[-1].split("x")[:-1])) if found else None

    @property
    def dtype(self) -> str:
        return re.findall(r"(?:(?:\d+x)+|: |> |to )(f32|f16|bf16|i\d+)\b", self.text.rsplit("->")[-1])[-1]


Block = list[Op]
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
VALUE = re.compile(r"%[\w#]+")


def _first(pattern: str, text: str) -> str:
    """What the group of the first match is."""
    match = re.search(pattern, text)
    assert match, (pattern, text)
    return match.group(1)


def parse(text: str) -> tuple[list[str], Block]:
    """The names of a module's function's arguments, and its body."""
    lines = iter([LOCATION.sub("", line).strip() for line in text.splitlines()])
    header = next(line for line in lines if line.startswith("tt.func"))
    return VALUE.findall(header), _block(lines)[0]


def _block(lines: Iterator[str]) -> tuple[Block, str]:
    """The operations up to a line that closes them, and this line."""
    found: Block = []
    for line in lines:
        if not line or line.startswith(("#", "^", "//")):
            continue
        if line.startswith("}"):
            return found, line
        match = re.match(r'(?:(%\w+)(?::(\d+))? = )?"?([\w.]+)"?(.*)', line)
        assert match, line
        result, count, name, rest = match.groups()
        results = [] if result is None else [f"{result}#{i}" for i in range(int(count))] if count else [result]
        op = Op(name, results, VALUE.findall(rest), rest)
        if name == "ttg.warp_specialize":
            close = "}"
            while " : " not in close:  # a region's last brace has the types behind it
                head = next(line for line in lines if line)
                region, close = _block(lines)
                op.regions.append(region)
                op.arguments.append(VALUE.findall(head))
        elif line.endswith("{"):
            region, close = _block(lines)
            op.regions.append(region)
            if close.startswith("} else {"):
                other, close = _block(lines)
                op.regions.append(other)
            if name == "tt.reduce":
                op.text += close
        found.append(op)
    return found, ""


# ---- what values are, beside numbers and arrays ----


@dataclass
class Pointer:
    memory: Memory
    offset: Any  # elements

    def to(self, offset: Any) -> Pointer:
        return Pointer(self.memory, offset)


class Memory:
    """A tensor's, from its first element on. ``written``: how often each was."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.element_size() - tensor.storage_offset()
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), (size,), (1,))
        wide = self.flat.double() if tensor.is_floating_point() else self.flat.long()
        self.data = wide.numpy().astype(np.float32 if tensor.is_floating_point() else np.int64)
        self.written = np.zeros(size, np.int64)

    def finish(self) -> None:
        """The tensor gets what was written."""
        changed = torch.from_numpy(self.written > 0)
        self.flat[changed] = torch.from_numpy(self.data).to(self.flat.dtype)[changed]


@dataclass
class Descriptor:
    source: Pointer | None = None
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()  # elements, the last one 1
    size: int = 0  # of an element

    def read(self, first: list[int], shape: tuple[int, ...]) -> np.ndarray:
        """What the box has in it; zeros where it is outside."""
        assert self.source is not None
        index = np.indices(shape)
        at = [index[i] + first[i] for i in range(len(shape))]
        inside = np.all([(a >= 0) & (a < n) for a, n in zip(at, self.sizes, strict=True)], axis=0)
        offsets = self.source.offset + sum(a * s for a, s in zip(at, self.strides, strict=True))
        return np.where(inside, self.source.memory.data[np.where(inside, offsets, 0)], 0)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0
        self.copies: list[Callable[[], int]] = []  # under way; each returns its bytes

    def arrive(self, count: int, announced: int = 0) -> None:
        self.arrivals -= count
        self.bytes += announced
        assert self.arrivals >= 0, "more arrivals at a barrier than it counts"
        self._end()

    def land(self) -> None:
        for copy in self.copies:
            self.bytes -= copy()
        self.copies.clear()
        self._end()

    def _end(self) -> None:
        if self.arrivals == 0 and self.bytes == 0 and not self.copies:
            self.phase ^= 1
            self.arrivals = self.count


# ---- operations ----


def _c_division(a: Any, b: Any) -> Any:
    """Towards zero."""
    quotient = np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))
    return quotient if isinstance(quotient, np.ndarray) else int(quotient)


def _rounded(x: Any, dtype: str) -> Any:
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    return torch.as_tensor(np.asarray(x, np.float32)).to(kinds[dtype]).float().numpy()


COMPARE = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "divsi": _c_division, "divui": operator.floordiv,
    "remsi": lambda a, b: a - _c_division(a, b) * b, "minsi": np.minimum, "maxsi": np.maximum,
    "andi": operator.and_, "xori": operator.xor, "shli": operator.lshift,
    "shrsi": operator.rshift, "addf": operator.add, "subf": operator.sub,
    "mulf": operator.mul, "divf": operator.truediv, "maxnumf": np.fmax,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "exp2": np.exp2,
    "exp": np.exp,
    "log2": np.log2,
    "absf": np.abs,
    "negf": np.negative,
}
NOTHING = {"ttg.barrier", "gpu.barrier", "ttng.inval_barrier", "ttng.tensormap_fenceproxy_acquire"}


class Program:
    """One program of a kernel. ``order`` of groups of warps: the first that can goes on, as far as it can."""

    def __init__(self, index: int, order: Sequence[int], arguments: Env) -> None:
        self.index, self.order, self.env = index, order, arguments
        self.done = 0  # operations
        self.waits: dict[int, str] = {}  # of a group of warps, what for

    def run(self, block: Block, env: Env, group: int = 0) -> Run:
        """Executes; stops where it has to wait. Returns what the block yields."""
        for op in block:
            values = [env.get(x) for x in op.operands]
            if op.name in ("scf.yield", "ttg.warp_yield", "ttg.warp_return", "tt.return"):
                return values
            if op.name == "scf.for":
                yield from self.loop(op, env, group)
            elif op.name == "scf.if":
                if values[0] or len(op.regions) > 1:
                    found = yield from self.run(op.regions[not values[0]], env, group)
                    env.update(zip(op.results, found or [], strict=True))
            elif op.name == "ttg.warp_specialize":
                self.groups(op, env, values)
            elif op.name == "ttng.wait_barrier":
                barrier, parity = values[0].item(), int(values[1]) & 1
                self.waits[group] = op.text.strip()
                while barrier.phase == parity:
                    barrier.land()
                    if barrier.phase == parity:
                        yield
            else:
                result = self.operation(op, values)
                if op.results:
                    env[op.results[0]] = result
            self.done += 1
            if op.name == "ttng.arrive_barrier":
                yield  # to who has waited for it
        return None

    def loop(self, op: Op, env: Env, group: int) -> Run:
        variable, low, high, step, *carried = op.operands
        names, starts = carried[::2], carried[1::2]
        state = [env[x] for x in starts]
        for i in range(int(env[low]), int(env[high]), int(env[step])):
            env.update({variable: i, **dict(zip(names, state, strict=True))})
            state = yield from self.run(op.regions[0], env, group)
            state = state or []
        env.update(zip(op.results, state, strict=True))

    def groups(self, op: Op, env: Env, values: list[Any]) -> None:
        environments = [env, *(dict(zip(names, values, strict=True)) for names in op.arguments[1:])]
        running = {g: self.run(r, e, g) for g, (r, e) in enumerate(zip(op.regions, environments, strict=True))}
        while running:
            for group in [g for g in self.order if g in running]:
                before = self.done
                if next(running[group], "ended") == "ended":
                    del running[group]
                    break
                if self.done > before:
                    break
            else:
                raise RuntimeError(f"groups of warps wait for each other: {self.waits}")

    def operation(self, op: Op, values: list[Any]) -> Any:
        kind, _, name = op.name.partition(".")
        if op.name in NOTHING:
            return None
        if op.name == "arith.constant":
            return _constant(op)
        if op.name == "arith.cmpi" or op.name == "arith.cmpf":
            predicate = _first(r"^ (\w+),", op.text)
            return COMPARE[predicate[-2:]](*values)
        if op.name == "arith.select":
            return np.where(*values) if op.shape else values[1] if values[0] else values[2]
        if name in BINARY and kind == "arith":
            with np.errstate(all="ignore"):
                found = BINARY[name](*values)
            if op.dtype == "i1":
                return found & 1 if isinstance(found, int) and not isinstance(found, bool) else found
            return int(found) if isinstance(found, np.integer) else found
        if name in UNARY:
            with np.errstate(all="ignore"):
                return UNARY[name](np.float32(values[0]))
        if name in ("extsi", "extui", "trunci"):
            x = values[0]
            if name == "trunci" and op.text.rstrip().endswith("i1"):
                return bool(x & 1)
            return x.astype(np.int64) if isinstance(x, np.ndarray) else int(x)
        if name in ("truncf", "extf"):
            return _rounded(values[0], re.findall(r"(bf16|f16|f32)", op.text)[-1])
        return getattr(self, f"{kind}_{name}")(op, values)

    # Triton's own

    def tt_get_program_id(self, op: Op, values: list[Any]) -> int:
        return self.index if op.text.startswith(" x") else 0

    def tt_make_range(self, op: Op, values: list[Any]) -> np.ndarray:
        return np.arange(op.attribute("start"), op.attribute("end"))

    def tt_splat(self, op: Op, values: list[Any]) -> Any:
        x = values[0]
        if isinstance(x, Pointer):
            return x.to(np.full(op.shape, x.offset))
        return np.full(op.shape, x, np.float32 if isinstance(x, (float, np.floating)) else None)

    def tt_expand_dims(self, op: Op, values: list[Any]) -> Any:
        return _shaped(values[0], lambda x: np.expand_dims(x, op.attribute("axis")))

    def tt_broadcast(self, op: Op, values: list[Any]) -> Any:
        return _shaped(values[0], lambda x: np.broadcast_to(x, op.shape))

    def ttg_convert_layout(self, op: Op, values: list[Any]) -> Any:
        return values[0]

    def tt_reduce(self, op: Op, values: list[Any]) -> Any:
        kinds = {body.name for body in op.regions[0]}
        axis = op.attribute("axis")
        return np.fmax.reduce(values[0], axis) if "arith.maxnumf" in kinds else values[0].sum(axis, dtype=np.float32)

    def tt_elementwise_inline_asm(self, op: Op, values: list[Any]) -> np.ndarray:
        """``hide`` (test_attention_specialized.py has what its code means)."""
        x, first, second, whole = values[-4:]
        hidden = np.float32(-np.inf if "0fff800000" in op.text else 0)
        return np.where((whole != 0) | (first <= second), x, hidden)

    def tt_addptr(self, op: Op, values: list[Any]) -> Pointer:
        return values[0].to(values[0].offset + values[1])

    def tt_load(self, op: Op, values: list[Any]) -> Any:
        pointer, *rest = values
        if not rest:
            return pointer.memory.data[pointer.offset]
        seen = np.broadcast_to(rest[0], np.shape(pointer.offset))
        loaded = pointer.memory.data[np.where(seen, pointer.offset, 0)]
        return np.where(seen, loaded, rest[1] if len(rest) > 1 else np.nan)

    def tt_store(self, op: Op, values: list[Any]) -> None:
        pointer, value, *mask = values
        offsets, value = np.broadcast_arrays(pointer.offset, value)
        seen = np.broadcast_to(mask[0], offsets.shape) if mask else np.ones(offsets.shape, bool)
        pointer.memory.data[offsets[seen]] = value[seen]
        np.add.at(pointer.memory.written, offsets[seen], 1)

    # shared memory, TMA, tensor cores

    def ttg_local_alloc(self, op: Op, values: list[Any]) -> np.ndarray:
        shape = op.shape
        if op.dtype == "i64":
            return np.array([Barrier() for _ in range(int(np.prod(shape)))]).reshape(shape)
        return np.full(shape, np.nan, np.float32)

    def ttg_memdesc_index(self, op: Op, values: list[Any]) -> np.ndarray:
        return values[0][int(values[1])]

    def ttg_memdesc_trans(self, op: Op, values: list[Any]) -> np.ndarray:
        return values[0].T

    def ttg_local_load(self, op: Op, values: list[Any]) -> np.ndarray:
        return values[0].copy()

    def ttg_global_scratch_alloc(self, op: Op, values: list[Any]) -> Descriptor:
        return Descriptor()

    def ttng_tensormap_create(self, op: Op, values: list[Any]) -> None:
        box, sizes, strides, _ = ([int(self.env[x]) for x in VALUE.findall(part)] for part in
                                  re.findall(r"\[([^\]]*)\]", op.text)[:4])  # fmt: skip
        size = {10: 2, 6: 2, 7: 4}[op.attribute("elem_type")]  # bfloat16, float16, float32
        assert all(s % 16 == 0 for s in strides) and all(b <= 256 for b in box)
        descriptor = values[0]
        descriptor.source, descriptor.sizes = values[1], tuple(sizes[::-1])
        descriptor.strides = (*(s // size for s in strides[::-1]), 1)
        descriptor.size = size

    def ttng_reinterpret_tensor_descriptor(self, op: Op, values: list[Any]) -> Descriptor:
        return values[0]

    def ttng_init_barrier(self, op: Op, values: list[Any]) -> None:
        barrier = values[0].item()
        barrier.count = barrier.arrivals = int(_first(r", (\d+)", op.text))

    def ttng_barrier_expect(self, op: Op, values: list[Any]) -> None:
        values[0].item().arrive(1, int(_first(r", (\d+)", op.text)))

    def ttng_arrive_barrier(self, op: Op, values: list[Any]) -> None:
        values[0].item().arrive(int(_first(r", (\d+)", op.text)))

    def ttng_async_tma_copy_global_to_local(self, op: Op, values: list[Any]) -> None:
        descriptor, *first, to, barrier, _ = values
        to[...] = np.nan

        def land() -> int:
            box = (1,) * (len(first) - to.ndim) + to.shape
            to[...] = descriptor.read([int(x) for x in first], box).reshape(to.shape)
            return to.size * descriptor.size

        barrier.item().copies.append(land)

    def ttng_warp_group_dot(self, op: Op, values: list[Any]) -> np.ndarray:
        a, b, c = values[:3]
        with np.errstate(all="ignore"):
            return (a.astype(np.float32) @ b.astype(np.float32) + c).astype(np.float32)


def _shaped(x: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    return x.to(change(np.asarray(x.offset))) if isinstance(x, Pointer) else change(x)


def _constant(op: Op) -> Any:
    said = _first(r"^ (?:{[^}]*} )?(?:dense<)?([^\s>]+)", op.text)
    if said in ("true", "false"):
        value: Any = said == "true"
    elif op.dtype in ("f32", "f16", "bf16"):
        value = np.uint32(int(said, 16)).view(np.float32) if said.startswith("0x") else np.float32(said)
    else:
        value = int(said, 0)
    return np.full(op.shape, value) if op.shape else value


def execute(ttgir: str, arguments: Env, programs: int, order: Sequence[int] = range(3)) -> None:
    """Runs all programs of a kernel; arguments by name: memories, numbers."""
    names, body = parse(ttgir)
    given = {name: arguments[name[1:]] for name in names}
    given = {name: Pointer(x, 0) if isinstance(x, Memory) else x for name, x in given.items()}
    for index in range(programs):
        program = Program(index, order, dict(given))
        for _ in program.run(body, program.env):
            raise RuntimeError(f"it waits: {program.waits}")
