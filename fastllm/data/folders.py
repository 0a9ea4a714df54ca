"""Which files of a folder are text to train on, and what is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError

TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for line in (
        "txt text md rst tex org html xml csv tsv json jsonl toml yaml yml ini cfg css srt sql ipynb",
        "py pyi c h cc cpp cxx hpp cu cuh rs go java kt js jsx ts tsx rb php pl lua r jl hs ml scala swift sh",
    )
    for suffix in line.split()
)

# Folders that hold what was installed or computed, apart from hidden ones and those with one of MARKERS in them.
CACHES = frozenset(("__pycache__", "node_modules", "bower_components", "site-packages", "dist-packages"))
MARKERS = frozenset(("CACHEDIR.TAG", "pyvenv.cfg"))

# Files of a run folder and of a Hugging Face model: a folder with two of them holds no text to train on.
MODEL_FILES = frozenset(
    name
    for line in (
        "run.json config.toml tokenizer.json model.safetensors log.jsonl",
        "config.json generation_config.json tokenizer_config.json special_tokens_map.json added_tokens.json",
        "vocab.json vocab.txt merges.txt chat_template.jinja preprocessor_config.json adapter_config.json",
        "model.safetensors.index.json adapter_model.safetensors pytorch_model.bin pytorch_model.bin.index.json",
    )
    for name in line.split()
)


# Names by which a folder is one that ``fastllm data`` makes, or is making.
OWN_FOLDERS = (
    ("corpus", frozenset(("plan.json", "samples.jsonl"))),
    ("corpus", frozenset(("plan.json", "work"))),
    ("folder of tokens", frozenset(("index.json", "tokenizer.json"))),
    ("folder of tokens", frozenset(("work", "tokenizer.json"))),
)


class LeftOut:
    """What is not read, by the reason: how many, and the first."""

    def __init__(self) -> None:
        self._found: dict[str, list[Path]] = {}

    def add(self, reason: str, path: Path) -> None:
        self._found.setdefault(reason, []).append(path)

    def __str__(self) -> str:
        """One line: "hidden folders (2, such as .git); links to folders (1: …)"; empty where nothing was left out."""
        return "; ".join(
            f"{reason} ({len(paths):,}{', such as' if len(paths) > 1 else ':'} {printable(paths[0])})"
            for reason, paths in self._found.items()
        )


def model_files(names: Iterable[str]) -> list[str]:
    """Those of a folder's names by which it is a run folder or a Hugging Face model; empty for another folder."""
    found = sorted(MODEL_FILES.intersection(names))
    return found if len(found) > 1 else []


def own_folder(names: Iterable[str]) -> str:
    """What a folder with these names is that ``fastllm data`` makes; empty for another folder."""
    found = set(names)
    return next((kind for kind, marks in OWN_FOLDERS if marks <= found), "")


def refuse_own(path: str | Path) -> None:
    """Raise UserError where ``path`` is a folder that ``fastllm data`` makes, or is making: it is no source."""
    try:
        kind = own_folder(os.listdir(path))
    except (OSError, ValueError):  # no folder; who reads it says what it is
        return
    if kind:
        raise UserError(f"{printable(path)} is a {kind}, finished or not, which fastllm made: it is no source of text")


def text_files(root: Path, left_out: LeftOut, suffixes: frozenset[str] = TEXT_SUFFIXES) -> Iterator[Path]:
    """The files of ``suffixes`` in ``root`` and the folders in it, in the order of their names."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out.add("folders that can't be read", folder)
            continue
        names = {entry.name for entry in entries}
        if folder != root and (reason := _reason_to_skip(folder.name, names)):
            left_out.add(reason, folder)
            continue
        inner = []
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                inner.append(path)
            elif entry.is_symlink() and os.path.isdir(path):
                left_out.add("links to folders", path)
            elif path.suffix.lower() in suffixes and not entry.name.startswith("."):
                yield path
        folders += reversed(inner)


def _reason_to_skip(name: str, names: set[str]) -> str:
    if name.startswith("."):
        return "hidden folders"
    if name in CACHES or names & MARKERS:
        return "folders of installed or cached files"
    if own_folder(names):
        return "corpora and folders of tokens"
    return "run or model folders" if model_files(names) else ""


def kind_of_file(mode: int) -> str:
    """What ``st_mode`` says of a file that is no regular one; empty for a regular file."""
    kinds = {
        stat.S_ISDIR: "folder",
        stat.S_ISFIFO: "named pipe",
        stat.S_ISSOCK: "socket",
        stat.S_ISCHR: "device",
        stat.S_ISBLK: "device",
    }
    return next((kind for test, kind in kinds.items() if test(mode)), "" if stat.S_ISREG(mode) else "special file")


def printable(path: str | Path) -> str:
    """``path`` for people, in one line: what is not UTF-8 or can't be printed becomes an escape."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(path))


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # how Python has a byte that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()
