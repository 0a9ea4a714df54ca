"""Options of a command line that are read before it is parsed, without what the extras install."""

from __future__ import annotations


def value_of(option: str, argv: list[str]) -> str | None:
    """What ``argv`` gives for an option; None: it is not there."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.removeprefix(option + "=")
    return None


def asks_for_help(argv: list[str]) -> bool:
    """Whether ``argv`` asks for help."""
    return any(word in ("-h", "--help", "--help-all") for word in argv)
