"""From results to Markdown: the report of a device, and the measured parts of the READMEs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fastllm.files import write_atomic

from .cases import COMPILED, COPY, DROP_IN, LADDER, PER_UNIT, PYTORCH, is_ours, is_theirs
from .peaks import DATASHEET
from .record import Error, Result, Row, best, committed, find

BEGIN, END = "<!-- measured: begin (python -m benchmarks --readme) -->", "<!-- measured: end -->"
README = Path(__file__).resolve().parent.parent / "README.md"  # one table
FULL_README = Path(__file__).resolve().parent / "README.md"  # every device
BASE = {DROP_IN: "transformers"}  # what times are ratios to, where it is not PyTorch
PLOTS = {
    "speedup": "times as fast as PyTorch",
    "attention": "time and memory of attention by length",
    "linear_cross_entropy": "time and memory of a head with its loss",
    "rms_norm": "bandwidth of RMSNorm by columns",
    "ladder": "the training step, one change after another",
}


def report(result: Result, plots: Iterable[str]) -> str:
    """All that a run found."""
    stamp = result.stamp
    lines = [f"# {stamp['device']}", "", ", ".join(f"{k} {v}" for k, v in stamp.items() if k != "device"), ""]
    commits = sorted({row.commit for row in result.rows if row.commit})
    lines += [f"Some rows are of other commits: {', '.join(commits)} (results.json says which).", ""] if commits else []
    lines += [_machine(result), ""]
    lines += [
        f"Times are medians; ± is half the range between the quartiles. Implementations were timed {stamp['timed']}.",
        "The rate is the least that must be done (benchmarks/*.py say what) over the time; its shares are of the copy",
        "bandwidth or of the matrix rate above. Memory is the peak of a call beyond its inputs, gradients included.",
        "",
    ]
    ops: dict[str, list[list[Row]]] = {}
    for rows in result.by_case().values():
        ops.setdefault(rows[0].op, []).append(rows)
    on_gpu = "gpu" in stamp
    if on_gpu:
        lines += [
            "Times are the GPU's alone. Host is what the processor takes to enqueue a call: where it is longer, it is",
            "the limit of calls one after another, unless a CUDA graph replays them. A call that waits for the GPU, or",
            "has more launches than the driver queues, has none of its own: its time includes what the GPU waits.",
            "",
        ]
    for op, cases in ops.items():
        lines += [f"## {op}", "", *_table(cases, _limits(result), on_gpu), ""]
    for name in plots:
        lines += [f"![{PLOTS[name]}]({name}.png)", ""]
    if result.errors:
        lines += ["## Errors against float64", "", *_errors(result.errors), ""]
    return "\n".join(lines)


def _limits(result: Result) -> dict[str, dict[str, float]]:
    """What shares are taken of, by the column's title."""
    limits = {"share": result.peaks}
    if result.stamp.get("gpu") in DATASHEET:
        limits["of the data sheet"] = dict(zip(("copy", "bfloat16"), DATASHEET[result.stamp["gpu"]], strict=True))
    return limits


def _machine(result: Result) -> str:
    p = result.peaks
    if not p:
        return "The machine's own limits were not measured in this run."
    text = f"This machine copies {p['copy']:.0f} GB/s (read and written) and multiplies matrices at "
    text += f"{p['bfloat16']:.3g} TFLOP/s in bfloat16, {p['float32']:.3g} in float32, as PyTorch does it."
    if result.stamp.get("gpu") in DATASHEET:
        bandwidth, rate = DATASHEET[result.stamp["gpu"]]
        text += f" Its data sheet says {bandwidth:.0f} GB/s and {rate:.0f} TFLOP/s."
    return text


def _table(cases: list[list[Row]], limits: dict[str, dict[str, float]], on_gpu: bool) -> list[str]:
    columns = ["median ms", "±", *(["host ms"] if on_gpu else []), "times", "rate", *limits, "memory MiB", "rounds"]
    lines = [f"| case | implementation | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for rows in cases:
        base = find(rows, BASE.get(rows[0].op, PYTORCH))
        case = f"{rows[0].direction} {rows[0].size} {rows[0].dtype}"
        for row in rows:
            if row.error:
                cells = [row.error.replace("|", "/"), *[""] * (len(columns) - 1)]
            else:
                whole = is_ours(row.implementation) or is_theirs(row.implementation)
                cells = [_ms(row.seconds), f"{(row.high - row.low) * 500:.2g}"]
                if on_gpu:
                    cells.append("waits" if row.host is None else _ms(row.host))
                cells.append(f"{base.seconds / row.seconds:.2f}" if base and whole else "")
                cells += [_rate(row), *(_share(row, limit) for limit in limits.values())]
                cells += ["" if row.memory is None else f"{row.memory / 2**20:.1f}", str(row.rounds)]
            lines.append(f"| {case} | {row.implementation} | {' | '.join(cells)} |")
            case = ""
    return lines


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _rate(row: Row) -> str:
    if row.implementation == COPY:
        return ""  # it moves other bytes than the op
    rate = row.work / row.seconds / PER_UNIT[row.unit]
    return f"{rate:,.0f} {row.unit}" if rate >= 100 else f"{rate:.3g} {row.unit}"


def _share(row: Row, limits: dict[str, float]) -> str:
    limit = {"GB/s": limits.get("copy"), "TFLOP/s": limits.get(row.dtype)}.get(row.unit)
    return f"{row.work / row.seconds / PER_UNIT[row.unit] / limit:.0%}" if limit and row.implementation != COPY else ""


def _errors(errors: list[Error]) -> list[str]:
    lines = [
        "The largest error of each output and gradient, PyTorch's own in the same dtype, and their ratio. The rule: at",
        "most twice PyTorch's, plus one rounding step (benchmarks/accuracy.py).",
        "",
        "| op | dtype | backend | error / PyTorch's = ratio | within the rule |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Error]] = {}
    for e in errors:
        groups.setdefault((e.op, e.dtype, e.backend), []).append(e)
    for (op, dtype, backend), found in groups.items():
        text = ", ".join(_error(e) for e in found)
        verdicts = {e.within for e in found}
        verdict = "**no**" if False in verdicts else "left out" if None in verdicts else "yes"
        lines.append(f"| {op} | {dtype} | {backend} | {text} | {verdict} |")
    return lines


def _error(e: Error) -> str:
    if e.error is None:
        return e.output.replace("|", "/")
    ratio = f" = {e.error / e.pytorch:.2f}" if e.pytorch else ""
    return f"{e.output} {e.error:.1e} / {e.pytorch:.1e}{ratio}"


# ---- the READMEs ----


def measured_parts() -> dict[Path, str]:
    """For each README the text between its marks, from all committed results."""
    found = list(committed())
    gpus = [(folder, result) for folder, result in found if "gpu" in result.stamp]
    note = [] if gpus else ["No GPU has run these kernels yet."]
    main = max(gpus or found, key=lambda one: len(one[1].rows))
    parts = {
        README: [_brief(*main), *note],
        FULL_README: [*note, *(_device(folder, result) for folder, result in found)],
    }
    return {path: f"{BEGIN}\n\n" + "\n\n".join(text) + f"\n\n{END}" for path, text in parts.items()}


def update_readmes() -> bool:
    """Write the measured parts. Whether anything changed."""
    changed = False
    for path, part in measured_parts().items():
        text = path.read_text("utf-8")
        start, end = text.index(BEGIN.split(" (")[0]), text.index(END) + len(END)
        new = text[:start] + part + text[end:]
        if new != text:
            write_atomic(path, new.encode())
            changed = True
    return changed


def _headlines(result: Result) -> dict[tuple[str, str], list[Row]]:
    """Of each op and dtype the last size, with backward where there is one."""
    headlines: dict[tuple[str, str], list[Row]] = {}
    for (op, _, direction, dtype, _), rows in result.by_case().items():
        if op not in (LADDER, DROP_IN) and (
            direction == "forward+backward" or headlines.get((op, dtype), rows)[0].direction == direction
        ):
            headlines[op, dtype] = rows
    return headlines


def _brief(folder: Path, result: Result) -> str:
    """How many times as fast as PyTorch and torch.compile each op is, in bfloat16, and the plot of it."""
    stamp = result.stamp
    kernels = f" ({stamp['cpu kernels']})" if "cpu kernels" in stamp else ""
    lines = [
        f"{stamp['device']}{kernels}, torch {stamp['torch']}, bfloat16; times as fast as",
        "",
        "| | PyTorch | torch.compile | the best other |",
        "|---|---:|---:|---:|",
    ]
    for (_, dtype), rows in _headlines(result).items():
        ours = best(rows, is_ours)
        if dtype != "bfloat16" or ours is None:
            continue
        others = (find(rows, PYTORCH), find(rows, COMPILED), best(rows, is_theirs))
        times = " | ".join(
            "" if other is None or other.error else f"{other.seconds / ours.seconds:.2f}" for other in others
        )
        lines.append(f"| `{rows[0].op}` {rows[0].direction} {rows[0].size} | {times} |")
    plot = f"benchmarks/results/{folder.name}/speedup.png"
    return "\n".join([*lines, "", f"![{PLOTS['speedup']}]({plot})"])


def _device(folder: Path, result: Result) -> str:
    where = f"results/{folder.name}"
    stamp = result.stamp
    kernels = f", {stamp['cpu kernels']}" if "cpu kernels" in stamp else ""
    timed = f", timed {stamp['timed']}" if stamp["timed"] != "in turns" else ""
    lines = [f"### {stamp['device']}{kernels}, torch {stamp['torch']}{timed}", ""]
    lines += [
        "| (ms) | PyTorch | torch.compile | another | fastllm | times PyTorch | times the best |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rows in _headlines(result).values():
        lines += _headline(rows)
    lines += ["", *_steps(result)]
    if result.errors:
        held = [e.within for e in result.errors if e.within is not None]
        within = sum(held)
        lines += [
            f"Of {len(held)} outputs and gradients held against float64, {within} are within the rule: an "
            "error of at most twice PyTorch's own, plus one rounding step.",
            "",
        ]
    lines += [f"All of it, with the spread, errors and memory: [{where}]({where}/report.md).", ""]
    shown = [name for name in ("speedup", "attention", "linear_cross_entropy") if (folder / f"{name}.png").exists()]
    lines += [f"![{PLOTS[name]}]({where}/{name}.png)" for name in shown]
    return "\n".join(lines).rstrip()


def _headline(rows: list[Row]) -> list[str]:
    ours, base, fastest = best(rows, is_ours), find(rows, PYTORCH), best(rows, is_theirs)
    if ours is None or base is None or fastest is None:
        return []
    another = best(rows, lambda name: is_theirs(name) and name not in (PYTORCH, COMPILED))
    other = f"{_ms(another.seconds)} {another.implementation}" if another else ""
    compiled = find(rows, COMPILED)
    case = f"`{rows[0].op}` {rows[0].direction} {rows[0].size} {rows[0].dtype}"
    times, most = (f"{row.seconds / ours.seconds:.2f}" for row in (base, fastest))
    middle = _ms(compiled.seconds) if compiled else ""
    return [f"| {case} | {_ms(base.seconds)} | {middle} | {other} | {_ms(ours.seconds)} | {times} | {most} |"]


def _steps(result: Result) -> list[str]:
    lines = []
    for rows in result.by_case().values():
        op, size, dtype = rows[0].op, rows[0].size, rows[0].dtype
        if op == LADDER:
            lines += [f"The training step of the {size} tokens ({dtype}), one change a row:", ""]
        elif op == DROP_IN:
            lines += [f"`fastllm.patch` on a {size} ({dtype}):", ""]
        else:
            continue
        lines += _speeds(rows, BASE.get(op, PYTORCH))
    return lines


def _speeds(rows: list[Row], base_name: str) -> list[str]:
    lines = ["| | tokens/s | times | memory MiB |", "|---|---:|---:|---:|"]
    base = find(rows, base_name)
    for row in rows:
        if not row.error:
            times = f"{base.seconds / row.seconds:.2f}" if base else ""
            memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
            lines.append(f"| {row.implementation} | {row.work / row.seconds:,.0f} | {times} | {memory} |")
    return [*lines, ""]
