"""Builds the native module for this machine's GPU, unless the installed one is of these very sources.

python -m benchmarks.build
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "for-gpu"  # what the latest build was made of
# In a process of its own: this one may have begun before the package was installed.
CHECK = """
import sys, torch
from fastllm.kernels import native
missing = native.cuda_missing(torch.device("cuda", 0))
print(missing or f"CUDA C++ kernels for {native.KERNELS['cuda'].archs}")
sys.exit(missing is not None)
"""


def digest() -> str:
    """Of all that is compiled, and of the Python that it is compiled for."""
    found = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*"))):
        if path.is_file():
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def main() -> int:
    check, sources = [sys.executable, "-c", CHECK], digest()
    if BUILT.exists() and BUILT.read_text() == sources and subprocess.run(check, cwd=ROOT).returncode == 0:
        return 0
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-v", "-e", str(ROOT)]
    code = subprocess.run([sys.executable, *install], cwd=ROOT).returncode or subprocess.run(check, cwd=ROOT).returncode
    if code == 0:
        BUILT.parent.mkdir(exist_ok=True)
        BUILT.write_text(sources)
    return code


if __name__ == "__main__":
    sys.exit(main())
