"""The annotations hold: mypy, strict on the modules whose names people import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Checked strictly as well: what users import, and what they write classes for.
PUBLIC = (
    "fastllm/__init__.py", "fastllm/config.py", "fastllm/data/", "fastllm/inference/", "fastllm/model/",
    "fastllm/posttraining/",
    "fastllm/distributed/", "fastllm/training/", "fastllm/planning/", "fastllm/huggingface/load.py",
    "fastllm/huggingface/model_config.py", "fastllm/input_files.py",
    "fastllm/huggingface/export.py", "fastllm/run_dir.py", "fastllm/arguments.py", "fastllm/info.py",
    "fastllm/kernels/__init__.py", "fastllm/kernels/modules.py", "fastllm/kernels/backends.py",
    "fastllm/kernels/activation/op.py", "fastllm/kernels/attention/op.py", "fastllm/kernels/attention/decode_op.py",
    "fastllm/kernels/loss/cross_entropy_op.py", "fastllm/kernels/loss/jsd_op.py",
    "fastllm/kernels/loss/linear_op.py", "fastllm/kernels/loss/softmax_op.py", "fastllm/kernels/norm/op.py",
    "fastllm/kernels/rotary/op.py",
)  # fmt: skip
CONFIG = """
[mypy]
python_version = 3.11
ignore_missing_imports = true
implicit_reexport = true
strict = true
disallow_any_generics = false
disallow_untyped_calls = false
disallow_subclassing_any = false
disallow_untyped_decorators = false
warn_return_any = false
"""


def test_annotations(tmp_path):
    """mypy knows no package that is put together from folders: links make it one."""
    package = tmp_path / "fastllm"
    package.mkdir()
    for source in (*(ROOT / "fastllm").iterdir(), ROOT / "kernels"):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [*command, "-p", "fastllm"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert "checked" in done.stdout or "no issues" in done.stdout, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if re.match(r"fastllm/.*: error:", line)]
    wrong = [line for line in found if line.startswith(PUBLIC)]
    assert not wrong, "\n".join(wrong)
