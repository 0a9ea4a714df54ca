"""No text makes a filter take time that is quadratic in its length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[4]
CODE = r"""
from fastllm.data.cleaning import FILTERS
from fastllm.data.document import Document
PIECES = [
    "a", "@", "1.", " ", "\n", "\r", "a@", "a@b.", "2000:", "::", "+4", "+49 ", "1", "\u200d", "\u200c\u200da", "[1",
    "\u0301\u0323", "a\u0301", "\u4e2d", "\u0e01", "\u3002", ". ", ".)", "a b ", "a.\n", "-", "{", "\ud83d", "...",
]
for name, filter in FILTERS.items():
    judge = filter().build()
    for piece in PIECES:
        judge(Document(piece * (400_000 // len(piece)), "s", "web", "1", {"language": "en"}))
print("done")
"""


def test_time_is_linear_in_the_text():
    """400,000 characters of each: ten nanoseconds for each pair of them would take a quarter of an hour."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.stdout == "done\n", done.stderr
