"""Calls a reward function, in a process that rewards.py starts: it is someone's program, and may hang or crash.

It reads requests, JSON objects of a line each, and answers each with such a line: ``{"value": …}`` or ``{"error": …}``.
The first line that it writes says whether the function is there. It imports nothing of fastllm.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 240  # characters of an exception's message
INNER = (__file__, importlib.__file__)  # their lines tell nothing of an error


class Wrong(Exception):
    """What is wrong with the function, in full."""


def end_with(parent: int) -> None:
    """End when the process ``parent`` does, whatever the function is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it ended while this process started
        os._exit(1)


def load(spec: str) -> Callable[..., Any]:
    """The function ``spec``, MODULE:FUNCTION or FILE.py:FUNCTION; Wrong, or what its module raises."""
    source, _, name = spec.rpartition(":")
    sys.path.insert(0, os.getcwd())
    if source.endswith(".py"):
        path = Path(source).resolve()
        if not path.is_file():
            raise Wrong(f"there is no file {path}")
        sys.path.append(str(path.parent))
        # A file math.py must not take the place of the library's.
        known_as = f"reward_{path.stem}" if path.stem in sys.stdlib_module_names else path.stem
        found = importlib.util.spec_from_file_location(known_as, path)
        assert found and found.loader
        module = sys.modules[known_as] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, name, None)
    if function is None:
        raise Wrong(f"{source} has no function {name}")
    if not callable(function):
        raise Wrong(f"{name} is not a function, it is of type {type(function).__name__}")
    return function


def keywords(function: Callable[..., Any]) -> set[str] | None:
    """The keywords that ``function`` takes; None: all."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if "completion" not in names:
        raise Wrong(f"{getattr(function, '__name__', 'it')} has no parameter 'completion'")
    return names


def number(result: Any) -> float:
    """``result``, a number of Python's or a scalar of NumPy's or PyTorch's; Wrong where it is none, or not finite."""
    value = result
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        shown = "None" if result is None else f"a value of type {type(result).__name__}"
        raise Wrong(f"it returned {shown}, not a number")
    value = float(value)
    if not math.isfinite(value):
        raise Wrong(f"it returned {value}")
    return value


def problem(error: BaseException) -> str:
    """``error`` on one line and short, with where it came from."""
    if isinstance(error, Wrong):
        return " ".join(str(error).split())
    text = " ".join(f"{type(error).__name__}: {_message(error)}".rstrip(": ").split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in INNER and f.filename[:1] != "<"]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # its own way to show itself is broken too
        return ""


def main(spec: str, parent: int) -> None:
    end_with(parent)
    # The function gets no input, and what it prints must not come between the answers.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values).encode() + b"\n")

    try:
        function = load(spec)
        taken = keywords(function)
    except BaseException as error:  # SystemExit too
        answer(error=problem(error))
        return
    answer()
    for line in requests:
        arguments = json.loads(line)
        try:
            value = number(function(**{k: v for k, v in arguments.items() if taken is None or k in taken}))
        except BaseException as error:
            answer(error=problem(error))
        else:
            answer(value=value)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
