"""Checks of settings that come from a recipe."""

from __future__ import annotations

from ...errors import UserError
from ...input_files import shown


def check_integer(where: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{where} must be a whole number from {least:,} to {most:,}, it is {shown(value)}")


def check_share(where: str, value: object) -> None:
    """A number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:  # which NaN is not
        raise UserError(f"{where} must be a number above 0 and at most 1, it is {shown(value)}")


def check_flag(where: str, value: object) -> None:
    if type(value) is not bool:
        raise UserError(f"{where} must be true or false, it is {shown(value)}")
