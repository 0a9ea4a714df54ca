"""Imports between packages run downhill: what may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A package or module of fastllm, and what it may import beside itself, lowest first.
BASE = {"kernels", "errors", "files", "input_files", "console", "config", "hardware", "dtensor"}
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "errors": set(),
    "files": {"errors"},
    "input_files": {"errors"},
    "console": {"files"},
    "config": {"errors", "input_files"},
    "arguments": {"config", "errors"},
    "hardware": {"kernels"},
    "options": set(),
    "info": {"kernels", "errors", "__init__"},
    "dtensor": set(),
    "run_lock": {"console", "errors"},
    "model": BASE,
    "data": BASE | {"run_lock", "__init__"},  # the version
    "data_commands": BASE | {"arguments", "data"},
    "distributed": BASE | {"model"},
    "run_dir": BASE | {"model", "data"},
    "gguf": BASE | {"model", "data"},
    "huggingface": BASE | {"model", "data", "run_dir", "gguf"},
    "inference": BASE | {"model", "data", "run_dir", "huggingface", "gguf"},
    "evaluation": BASE | {"model", "data", "run_dir", "huggingface", "inference"},
    "training": BASE
    | {"model", "data", "run_dir", "run_lock", "distributed", "inference", "evaluation", "__init__"},  # the version
    "posttraining": BASE
    | {
        "model",
        "data",
        "run_dir",
        "run_lock",
        "distributed",
        "inference",
        "huggingface",
        "evaluation",
        "training",
        "__init__",
    },
    "posttraining_commands": BASE | {"arguments", "options", "posttraining"},
    "inference_commands": BASE | {"arguments", "run_dir", "inference", "training"},
    "tour": BASE | {"data", "training", "run_lock", "__init__"},  # the version; all else by commands
    "tour_commands": BASE | {"arguments", "tour"},
    "training_commands": BASE | {"arguments", "training"},
    "evaluation_commands": BASE | {"arguments", "evaluation", "__init__"},
    "serving_commands": BASE | {"arguments", "inference", "inference_commands"},
    "planning": BASE | {"model", "distributed", "training"},
}
ALLOWED["cli"] = BASE | {*ALLOWED, "benchmarks", "__init__"}
ALLOWED["benchmarks"] = {*ALLOWED} - {"cli"} | {"__init__"}
ALLOWED["__init__"] = set()  # public names are imported at first use
ALLOWED["__main__"] = {"cli"}


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module."""
    for package, folder in (
        ("fastllm", "fastllm"),
        ("fastllm.kernels", "kernels"),
        ("fastllm.benchmarks", "benchmarks"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *parts)), path


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules of fastllm that a file imports, inside of functions too."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastllm")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            if source.split(".")[0] == "fastllm":
                yield from (f"{source}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The package below fastllm, or the module at its top."""
    words = name.split(".")
    known = words[1] if len(words) > 1 else "__init__"
    return known if known in ALLOWED else "__init__"


def test_imports_run_downhill():
    wrong = []
    for name, path in sources():
        here = part(name)
        found = {part(target) for target in imports(name, path)} - {here}
        if name.endswith("__init__") and here == "__init__":
            continue
        wrong += [f"{path.relative_to(ROOT)} imports fastllm.{other}" for other in sorted(found - ALLOWED[here])]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle():
    """Between the packages; the table above can't hide one."""
    graph: dict[str, set[str]] = {}
    for name, path in sources():
        graph.setdefault(part(name), set()).update(part(target) for target in imports(name, path))
    done: set[str] = set()

    def visit(package: str, behind: tuple[str, ...]) -> None:
        assert package not in behind, " -> ".join((*behind, package))
        if package in done:
            return
        for other in graph.get(package, set()) - {package, "__init__"}:
            visit(other, (*behind, package))
        done.add(package)

    for package in graph:
        visit(package, ())


def test_every_package_has_its_line_in_the_table():
    top = {p.stem for p in (ROOT / "fastllm").glob("*.py")} | {
        p.parent.name for p in (ROOT / "fastllm").glob("*/__init__.py")
    }
    assert top | {"kernels", "benchmarks"} == set(ALLOWED)
