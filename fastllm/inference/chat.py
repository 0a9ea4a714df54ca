"""A conversation in the terminal."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..console import console, visible
from ..errors import UserError
from ..files import write_atomic
from .engine import Engine
from .prompts import chat_prompt
from .sampling import SamplingParams

HELP = """/reset        forget the conversation
/system TEXT  tell the model something first, from a new conversation on
/retry        answer the last message again
/undo         take back the last message and its answer
/save FILE    write the conversation as a line of JSON, as fastllm sft reads it
/help         this list
/exit         leave (Ctrl-D does too)
Ctrl-C stops an answer. A line that ends with a backslash continues on the next one."""


class Conversation:
    """The messages so far, and the commands that change them."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str) -> None:
        self._engine, self._params, self._system = engine, params, system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def command(self, line: str) -> bool:
        """Carry out a line that begins with "/"; False: leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.reset()
            console.print("a new conversation", style="dim")
        elif name == "/system":
            self._system = rest
            self.reset()
            told = f"with: {rest}" if rest else "without a system prompt"
            console.print(f"a new conversation, {told}", style="dim")
        elif name == "/save":
            self._save(rest)
        elif name in ("/retry", "/undo"):
            said = self._take_back()
            if said is None:
                console.print("there is no message yet", style="dim")
            elif name == "/retry":
                self.say(said)
        elif name == "/help":
            console.print(HELP, style="dim")
        else:
            console.print(f"there is no {name}; /help lists what there is", style="yellow")
        return True

    def say(self, text: str) -> None:
        """Add a message of the user, and the answer as it is generated. What is wrong with it is said."""
        self.messages.append({"role": "user", "content": text})
        answer, tokens, reason, began = "", 0, "cancelled", time.perf_counter()
        first = began
        try:
            prompt = chat_prompt(self._engine.tokenizer, self.messages)
            for delta in self._engine.stream(prompt, self._params):
                if not tokens:
                    first = time.perf_counter()
                tokens += len(delta.tokens)
                answer += delta.text
                console.print(visible(delta.text), end="")
                reason = delta.finish_reason or reason
        except KeyboardInterrupt:
            pass  # the answer ends here
        except UserError as error:
            console.print(f"{error}", style="red")
            if "context" in str(error):
                console.print("/reset begins a new conversation, /undo takes back the last message", style="dim")
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": answer})
        console.print()
        rate = (tokens - 1) / max(time.perf_counter() - first, 1e-9)
        end = {"cancelled": ", stopped", "length": ", cut off at its longest"}.get(reason, "")
        console.print(f"{tokens} tokens, {rate:.1f} tokens/s, first after {first - began:.2f} s{end}", style="dim")

    def _take_back(self) -> str | None:
        """Remove the last message of the user and what followed it."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                said = self.messages[i]["content"]
                del self.messages[i:]
                return said
        return None

    def _save(self, name: str) -> None:
        if not name:
            console.print("/save FILE names the file", style="yellow")
            return
        path = Path(name).expanduser()
        try:
            if path.exists():
                raise UserError(f"{path} is there already")
            write_atomic(path, (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())
            console.print(f"saved to {path}", style="dim")
        except (OSError, UserError) as error:
            console.print(f"{error}", style="red")


def chat(engine: Engine, name: str, params: SamplingParams, system: str) -> int:
    """Talk until the user leaves."""
    with suppress(ImportError):  # it gives input() a history and keys to edit with; Windows has none
        import readline  # noqa: F401 (importing it is all)
    console.print(f"{name}: {engine.max_seq_len:,} tokens of context; /help for commands, Ctrl-D to leave", style="dim")
    conversation = Conversation(engine, params, system)
    while True:
        try:
            line = _read()
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print()
            continue
        if line.startswith("/"):
            if not conversation.command(line):
                return 0
        elif line:
            conversation.say(line)


def _read() -> str:
    """What the user types; lines that end with a backslash are joined."""
    lines: list[str] = []
    while True:
        line = input("> " if not lines else "… ") if sys.stdin.isatty() else _next_line()
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()


def _next_line() -> str:
    """A line of standard input, which is no terminal."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
