"""All that is measured."""

from __future__ import annotations

from . import attention, losses, norm, pointwise, steps
from .cases import DROP_IN, Case, Scale


def every_case(scale: Scale) -> list[Case]:
    """What decides comes first: an end of time takes other people's models, and then the curves."""
    found = [case for family in (norm, losses, attention, pointwise, steps) for case in family.cases(scale)]
    return sorted(found, key=lambda case: (case.op == DROP_IN, bool(case.sweep)))
