"""The README's programs run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[1]


def test_the_trainer_example(tmp_path):
    """As it stands, but for the number of steps; from the checkout's folder, where a reader tries it."""
    (program,) = re.findall(r"```python\n(.*?Trainer\(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "max_steps=60" in program
    program = program.replace("max_steps=60", "max_steps=2").replace("runs/trainer", str(tmp_path))
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stderr
    assert "9 LlamaRMSNorm      rms_norm" in found.stdout
    assert "train_loss" in found.stdout
