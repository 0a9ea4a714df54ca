"""Checks of settings that come from a recipe."""

from __future__ import annotations

import math

from ...errors import UserError
from ...input_files import shown


def check_integer(where: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{where} must be a whole number from {least:,} to {most:,}, it is {shown(value)}")


def check_share(where: str, value: object) -> None:
    """A number above 0 and at most 1."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= 1:  # type: ignore[operator, arg-type]
        raise UserError(f"{where} must be a number above 0 and at most 1, it is {shown(value)}")


def check_flag(where: str, value: object) -> None:
    if type(value) is not bool:
        raise UserError(f"{where} must be true or false, it is {shown(value)}")
