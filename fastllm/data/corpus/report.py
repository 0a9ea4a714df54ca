"""The report of a corpus: report.json for programs, report.md with a picture for people."""

from __future__ import annotations

import io
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_atomic
from .parts import Part
from .recipe import Recipe
from .shards import REPORT, VERSION
from .tally import SourceTally, Tally

PICTURE = "report.png"
MOST_LANGUAGES = 12  # in the picture
MOST_SOURCES = 20


def make_report(
    recipe: Recipe,
    parts: list[Part],
    kept: np.ndarray,
    tally: Tally,
    shards: list[dict[str, Any]],
    seconds: float,
    version: str,
) -> dict[str, Any]:
    """The contents of report.json. ``kept``: bool ``[documents]``, of all parts."""
    count, characters = (np.zeros(len(recipe.sources), np.int64) for _ in range(2))
    lengths, languages = Counter[int](), Counter[str]()
    first = 0
    for part in parts:
        rows = part.rows()[kept[first : first + part.documents]]
        first += part.documents
        count += np.bincount(rows["source"], minlength=len(count))
        characters += np.bincount(rows["source"], rows["characters"], minlength=len(count)).astype(np.int64)
        exponents = np.frexp(rows["characters"].astype(np.float64))[1]  # as int.bit_length
        lengths.update(dict(zip(*(array.tolist() for array in np.unique(exponents, return_counts=True)), strict=True)))
        names, numbers = np.unique(rows["language"], return_counts=True)
        languages.update({name.decode() or "unknown": int(n) for name, n in zip(names, numbers, strict=True)})
    sources = []
    for n, spec in enumerate(recipe.sources):
        found = tally.source(spec.label)
        sources.append(
            {
                "name": spec.label,
                "weight": spec.weight,
                **found.to_json(),
                "kept": [int(count[n]), int(characters[n])],
            }
        )
    return {
        "version": VERSION,
        "fastllm": version,
        "made": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "seconds": round(seconds, 1),
        "documents": int(count.sum()),
        "characters": int(characters.sum()),
        "read": [sum(source["read"][i] for source in sources) for i in (0, 1)],
        "problems": sum(source["problems"] for source in sources),
        "sources": sources,
        "languages": dict(languages.most_common()),
        "lengths": {"read": _histogram(tally.lengths_read), "kept": _histogram(lengths)},
        "damage": tally.problems,
        "recipe": recipe.to_json(),
        "shards": shards,
    }


def _histogram(counts: Counter[int]) -> dict[str, int]:
    """Documents by the power of two that their characters are below."""
    return {str(2**n): counts[n] for n in sorted(counts)}


def dropped(report: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """(filter, reason, documents, characters) of all sources together, by filter in the order of its first drop."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for source in report["sources"]:
        for name, reasons in SourceTally.from_json(source).dropped.items():
            for reason, (documents, characters) in reasons.items():
                before = sums.get((name, reason), (0, 0))
                sums[name, reason] = before[0] + documents, before[1] + characters
    order = [*report["recipe"]["filters"], "damaged", "exact_duplicates", "near_duplicates", "decontamination"]
    return sorted(
        ((*key, *count) for key, count in sums.items()), key=lambda row: (order.index(row[0]), -row[2], row[1])
    )


def write_report(report: dict[str, Any], out: Path) -> None:
    """report.png, report.md and last report.json, which completes the corpus."""
    write_atomic(out / PICTURE, picture(report))
    write_atomic(out / "report.md", markdown(report, out).encode("utf-8", "replace"))
    write_atomic(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8", "replace"))


# ---- for people ----


def source_rows(report: dict[str, Any]) -> list[list[str]]:
    """For each source: name, kinds, documents and characters that were read, after the filters, and kept."""
    rows = []
    for source in report["sources"]:
        kinds = ", ".join(sorted(source["kinds"])) or "–"
        counts = [f"{n:,}" for key in ("read", "cleaned", "kept") for n in source[key]]
        rows.append([source["name"], kinds, *counts, f"{source['problems']:,}"])
    return rows


SOURCE_HEAD = ["source", "kind", "read", "characters", "cleaned", "characters", "kept", "characters", "damaged"]
DROP_HEAD = ["filter", "reason", "documents", "characters"]


def skipped(report: dict[str, Any]) -> Counter[str]:
    """Records that are no documents, by the reason."""
    found = Counter[str]()
    for source in report["sources"]:
        found.update(source["skipped"])
    return found


def markdown(report: dict[str, Any], out: Path) -> str:
    share = report["documents"] / max(report["read"][0], 1)
    lines = [
        f"# Corpus {out.name}",
        "",
        f"{report['documents']:,} documents of {report['characters']:,} characters, {share:.1%} of the "
        f"{report['read'][0]:,} that were read; made on {report['made']} by fastllm {report['fastllm']} "
        f"in {report['seconds']:,.0f} s, {len(report['shards'])} shards.",
        "",
        f"![documents and characters by source, filters, lengths, languages]({PICTURE})",
        "",
        "## Sources",
        "",
        *_table(SOURCE_HEAD, source_rows(report)),
        "",
        "## Dropped",
        "",
        *_table(DROP_HEAD, [[name, reason, f"{n:,}", f"{size:,}"] for name, reason, n, size in dropped(report)]),
        "",
        "## Passed over: records that are no documents",
        "",
        *_table(["reason", "records"], [[reason, f"{n:,}"] for reason, n in skipped(report).most_common()]),
        "",
        "## Languages",
        "",
        *_table(["language", "documents"], [[name, f"{n:,}"] for name, n in report["languages"].items()]),
    ]
    if report["damage"]:
        lines += ["", f"## Damage: {report['problems']:,}", ""]
        lines += _table(["where", "what"], [[entry["where"], entry["message"]] for entry in report["damage"]])
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["none"]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    bar = ["---:" if all(row[i].replace(",", "").isdigit() for row in rows) else "---" for i in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (cells[0], bar, *cells[1:])]


def picture(report: dict[str, Any]) -> bytes:
    """A PNG: characters by source before and after, what each filter dropped, lengths, languages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    (by_source, by_filter), (by_length, by_language) = figure.subplots(2, 2)
    sources = sorted(report["sources"], key=lambda source: -source["read"][1])[:MOST_SOURCES]
    names = [_short(source["name"]) for source in sources]
    title = (
        "sources" if len(sources) == len(report["sources"]) else f"the largest of {len(report['sources']):,} sources"
    )
    y = np.arange(len(names))
    for offset, key, color in ((-0.27, "read", "#b8c4d6"), (0, "cleaned", "#7f9cc7"), (0.27, "kept", "#2f5d9b")):
        sizes = [source[key][1] for source in sources]
        by_source.barh(y + offset, sizes, 0.27, label=key, color=color)
    by_source.set(yticks=y, yticklabels=names, xlabel="characters", title=title)
    by_source.invert_yaxis()
    by_source.legend()

    sums = Counter[str]()
    for name, _, documents, _ in dropped(report):
        sums[name] += documents
    by_filter.barh(list(sums), list(sums.values()), color="#a8503c")
    by_filter.set(xlabel="documents", title=f"dropped: {sum(sums.values()):,} of {report['read'][0]:,}")
    by_filter.invert_yaxis()

    for key, color in (("read", "#b8c4d6"), ("kept", "#2f5d9b")):
        bins = report["lengths"][key]
        if bins:
            x = np.array([int(size) for size in bins], np.float64)
            by_length.bar(x / 2, list(bins.values()), width=x / 2, align="edge", label=key, color=color)
    by_length.set_xscale("log", base=2)
    by_length.set(xlabel="characters of a document", ylabel="documents", title="lengths")
    by_length.legend()

    languages = dict(list(report["languages"].items())[:MOST_LANGUAGES])
    by_language.barh(list(languages), list(languages.values()), color="#5a8f5a")
    by_language.set(xlabel="documents", title="languages of what is kept")
    by_language.invert_yaxis()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _short(name: str) -> str:
    name = name.encode("utf-8", "replace").decode()
    name = name if len(name) <= 30 else f"…{name[-29:]}"
    return name.replace("$", r"\$")  # else what is between two of them is a formula
