"""All that is measured."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention, losses, norm, pointwise, steps
from .cases import Case, Scale


def every_case(scale: Scale, ops: tuple[str, ...] = ()) -> Iterator[Case]:
    """In the order of the report; ``ops`` limits them."""
    for family in (norm, losses, attention, pointwise, steps):
        for case in family.cases(scale):
            if not ops or case.op in ops:
                yield case
