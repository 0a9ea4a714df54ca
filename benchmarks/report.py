"""From pytest-benchmark's JSON to a Markdown table: implementations side by side.

python -m benchmarks.report RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def markdown(entries: list[dict[str, Any]]) -> str:
    """One table; per case the medians (with half the interquartile range) and how they compare."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        cases.setdefault(entry["extra_info"]["case"], []).append(entry)
    lines = [
        "| case | implementation | median ms | ± | times eager | rate | share of copy | memory MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, group in cases.items():
        rates = {e["extra_info"]["implementation"]: _rate(e) for e in group}
        eager = next((_median(e) for e in group if e["extra_info"]["implementation"] == "eager"), None)
        for entry in group:
            name, rate = entry["extra_info"]["implementation"], _rate(entry)
            speed = f"{eager / _median(entry):.2f}" if eager and name != "copy" else ""
            share = f"{rate / rates['copy']:.0%}" if rate and rates.get("copy") else ""
            unit, memory = entry["extra_info"].get("unit", "GB/s"), entry["extra_info"].get("memory")
            size = f"{memory / 2**20:.0f}" if memory else ""
            lines.append(
                f"| {case} | {name} | {_median(entry) * 1e3:.3f} | {float(entry['stats']['iqr']) * 500:.3f} "
                f"| {speed} | {f'{rate:.3g} {unit}' if rate else ''} | {share} | {size} |"
            )
            case = ""
    return "\n".join(lines)


def _median(entry: dict[str, Any]) -> float:
    return float(entry["stats"]["median"])


def _rate(entry: dict[str, Any]) -> float | None:
    """GB/s, or whatever per second the benchmark counts in its ``amount``."""
    facts = entry["extra_info"]
    amount = facts["bytes"] / 1e9 if "bytes" in facts else facts.get("amount")
    return amount / _median(entry) if amount else None


def read(path: Path) -> str:
    """A result file as Markdown, headed by where it comes from."""
    result = json.loads(path.read_text())
    facts = ", ".join(f"{k} {v}" for k, v in result["machine_info"].items())
    return f"{facts}\n\n{markdown(result['benchmarks'])}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.report RESULT.json")
    print(read(Path(sys.argv[1])))
