"""The programs in the READMEs run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[1]


def test_the_trainer_example(tmp_path):
    """As it stands, but for the number of steps; from the checkout's folder, where a reader tries it."""
    (program,) = re.findall(r"```python\n(.*?Trainer\(.*?)```", (ROOT / "fastllm" / "README.md").read_text(), re.DOTALL)
    assert "max_steps=60" in program
    program = program.replace("max_steps=60", "max_steps=2").replace("runs/trainer", str(tmp_path))
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert found.returncode == 0, found.stderr
    assert "9 LlamaRMSNorm      rms_norm" in found.stdout
    assert "train_loss" in found.stdout


def test_the_table_of_backends():
    """kernels/README.md names every op, with the backends that it has kernels for."""
    from fastllm.kernels.backends import BACKENDS, OPS

    text = (ROOT / "kernels" / "README.md").read_text()
    _, _, table = text.partition("| op | cpu | triton | cuda | torch |")
    listed: dict[str, set[str]] = {}
    for line in table.split("\n\n")[0].splitlines()[2:]:
        names, *marks = (cell.strip() for cell in line.strip("|").split("|"))
        found = {backend for backend, mark in zip(("cpu", "triton", "cuda", "torch"), marks, strict=True) if mark}
        listed |= {name.strip("`"): found for name in names.split(", ")}
    assert listed == {name: {*op.kernels, "torch"} & {*BACKENDS} for name, op in OPS.items()}
    for name in OPS:
        assert f"| `{name}` | `(" in text


def test_the_table_of_families():
    """What fastllm/README.md says of some is what the table of classes says."""
    from fastllm.huggingface.patching.table import families

    listed = families().splitlines()
    text = (ROOT / "fastllm" / "README.md").read_text()
    _, _, table = text.partition(listed[0])
    rows = table.split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    assert set(rows) <= set(listed)
    assert f"{len(listed) - 2} families" in text
