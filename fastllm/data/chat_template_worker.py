"""Renders chat templates in a process of its own, which chat_template.py starts: a template is a program.

A template may come from anywhere, and Jinja's sandbox bounds neither its time nor its memory: nested loops, macros
that call themselves, strings that double. So the system bounds this process, and kills it where a template is too
much. It reads requests, JSON of a line each, and answers each with a line. It imports nothing of fastllm.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**29  # bytes that a chat may take
LONGEST = 2**24  # characters of a rendered chat


class Generation(Extension):
    """The block ``generation``, with which training marks answers; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form of an extension)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """A namespace without names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} can't be a name in a namespace")


class Dict:
    """What templates know as ``dict``: the type itself has ways out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers' templates have it: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(64)
def compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception, "strftime_now": strftime_now, "dict": Dict(), "namespace": Namespace,
    }  # fmt: skip
    return environment.from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """``{"text": …}``, or ``{"error": …}``."""
    try:
        text = compiled(request["source"]).render(request["variables"])
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY // 2**20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a template does wrong: adds a number to a string, divides by zero
        return {"error": f"{type(error).__name__}: {error}"}
    if len(text) > LONGEST:
        return {"error": f"its text has more than {LONGEST:,} characters"}
    return {"text": text}


def main(seconds: float) -> None:
    """``seconds``: of processor time for a chat."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal kills
        try:
            result = answer(json.loads(line))
        except MemoryError:
            result = {"error": f"the chat takes more than {MEMORY // 2**20} MiB of memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
