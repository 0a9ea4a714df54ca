"""What a corpus is made of and how: sources with weights, filters with their thresholds, duplicates."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import config as configs
from ...errors import UserError, did_you_mean
from ...input_files import shown
from ..cleaning import FILTERS
from ..deduplication import DecontaminationSettings, MinHashSettings
from ..folders import printable
from ..readers import ReaderOptions

MOST_SOURCES = 2**16 - 1  # their numbers are uint16


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user named it."""

    path: str  # a file, a folder, a pattern with * or ?, a URL, or hf:NAME of a Hugging Face data set
    name: str = ""  # in reports and mixtures; by default the path
    weight: float = 0.0  # its share of a training batch, as fastllm train mixes them; of none: all tokens once

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("the path of a source is empty")
        if not 0 <= self.weight < math.inf:
            raise UserError(f"the weight of a source must be a number of at least 0, it is {self.weight}")

    @property
    def label(self) -> str:
        return printable(self.name or self.path)

    def paths(self) -> list[str]:
        """The files and folders that a pattern stands for; of anything else itself."""
        if (
            not set("*?[") & set(self.path)
            or self.path.startswith(("http:", "https:", "hf:"))
            or Path(self.path).exists()
        ):
            return [self.path]
        found = sorted(glob.glob(self.path, recursive=True))
        if not found:
            raise UserError(f"no file matches {self.path}")
        return found


def default_filters() -> dict[str, Any]:
    return {name: settings() for name, settings in FILTERS.items()}


@dataclass(frozen=True)
class Recipe:
    """All that a corpus depends on."""

    sources: tuple[SourceSpec, ...] = ()
    readers: ReaderOptions = field(default_factory=ReaderOptions)
    filters: dict[str, Any] = field(default_factory=default_filters)  # settings by the filter's name, see cleaning
    exact_duplicates: bool = True  # drop documents of the same text
    near_duplicates: MinHashSettings = field(default_factory=MinHashSettings)
    decontamination: DecontaminationSettings = field(default_factory=DecontaminationSettings)

    def __post_init__(self) -> None:
        labels = [source.label for source in self.sources]
        if twice := [label for label, n in Counter(labels).items() if n > 1]:
            raise UserError(f"two sources are called {min(twice)}: give each a name of its own")
        if len(labels) > MOST_SOURCES:
            raise UserError(
                f"there are {len(labels):,} sources, at most {MOST_SOURCES:,} are possible: name their folder"
            )
        weighted = [source.label for source in self.sources if source.weight]
        if weighted and len(weighted) < len(labels):
            raise UserError(f"{weighted[0]} has a weight: give one to each of the sources, or to none")

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def without(self, names: tuple[str, ...]) -> Recipe:
        """Without the filters of these names (also exact_duplicates, near_duplicates and decontamination)."""
        return self._switched(dict.fromkeys(names, False))

    def _switched(self, enabled: dict[str, bool]) -> Recipe:
        known = [*self.filters, "exact_duplicates", "near_duplicates", "decontamination"]
        for name in enabled:
            if name not in known:
                raise UserError(f"there is no filter {name!r}{did_you_mean(name, known)}")
        filters = {
            name: replace(settings, enabled=enabled.get(name, settings.enabled))
            for name, settings in self.filters.items()
        }
        parts = {
            name: replace(getattr(self, name), enabled=enabled.get(name, getattr(self, name).enabled))
            for name in ("near_duplicates", "decontamination")
        }
        exact = enabled.get("exact_duplicates", self.exact_duplicates)
        return replace(self, filters=filters, exact_duplicates=exact, **parts)

    @property
    def decontaminates(self) -> bool:
        return self.decontamination.enabled and bool(self.decontamination.files)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file.

    Its tables: ``[[sources]]`` with ``path``, ``name`` and ``weight``; ``[readers]``; ``[filters.NAME]`` for each
    filter, with ``enabled`` and its thresholds; ``[duplicates]`` with ``exact``; ``[near_duplicates]``;
    ``[decontamination]``. What it does not set has its default. Relative paths are those from the file's folder.

    Raises:
        UserError: the file can't be read, or has a key or value that is none.
    """
    tables = configs.read_toml(path)
    known = ("sources", "readers", "filters", "duplicates", "near_duplicates", "decontamination")
    for name in tables:
        if name not in known:
            raise UserError(f"{path}: unknown key {shown(name)}{did_you_mean(name, known)}")
    specs = tables.get("sources", [])
    if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
        raise UserError(f"{path}: sources must be tables: write [[sources]] above the path of each")
    folder = Path(path).parent
    sources = tuple(
        _beside(configs.merged_table(SourceSpec("-"), spec, f"sources[{n}]", path), folder, f"{path}: sources[{n}]")
        for n, spec in enumerate(specs)
    )
    filters = default_filters()
    for name, values in _table(tables, "filters", path).items():
        if name not in filters:
            raise UserError(f"{path}: there is no filter {shown(name)}{did_you_mean(name, filters)}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: filters.{name} must be a table: write [filters.{name}] above its keys")
        filters[name] = configs.merged_table(filters[name], values, f"filters.{name}", path)
    recipe = Recipe()
    exact = _table(tables, "duplicates", path)
    if set(exact) - {"exact"} or not isinstance(exact.get("exact", True), bool):
        raise UserError(f"{path}: [duplicates] has one key, exact, which is true or false")
    near, decontamination, readers = (
        configs.merged_table(getattr(recipe, name), _table(tables, name, path), name, path)
        for name in ("near_duplicates", "decontamination", "readers")
    )
    files = tuple(str(folder / file) for file in decontamination.files)
    return configs.built(
        path,
        Recipe,
        sources,
        readers,
        filters,
        exact.get("exact", True),
        near,
        replace(decontamination, files=files),
    )


def _table(tables: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} must be a table: write [{name}] above its keys")
    return table


def _beside(spec: SourceSpec, folder: Path, what: str) -> SourceSpec:
    if spec.path == "-":
        raise UserError(f"{what} has no path")
    if spec.path.startswith(("http:", "https:", "hf:")):
        return spec
    return replace(spec, path=str(folder / spec.path), name=spec.name or spec.path)
