"""What users install: sdist → wheel → a clean environment → an op on the cpu backend, and what happens on the way.

The wheel is compiled without optimisation and for one instruction set: the same files, in a fifth of the time.
"""

from __future__ import annotations

import email
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import zipfile
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "fastllm/inference/server/page"
QUICK = {"CXXFLAGS": "-O0", "FASTLLM_CPU_ISAS": "base", "FASTLLM_CUDA_ARCHS": "none"}
CALL = """
import sys, torch
import fastllm
assert fastllm.__file__.startswith(sys.prefix), fastllm.__file__
x = torch.randn(3, 8)
y = fastllm.kernels.rms_norm(x, backend="cpu")
assert torch.allclose(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6), atol=1e-6)
print("ran", fastllm.kernels.native.KERNELS["cpu"].instruction_set())
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("PYTHONPATH", "TRITON_INTERPRET", "CXX", "CXXFLAGS", "FASTLLM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | environment
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG)


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    return set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())


def make_wheel(source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a source folder or sdist, and what its build printed."""
    words = ("wheel", source, "--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", out)
    printed = succeed(sys.executable, "-m", "pip", *words, cwd=out.parent, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, printed


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, and beside it what is installed here; its python."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    words = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    succeed(sys.executable, "-m", "pip", *words, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths in a .pth file bring packages, but not the .pth files there: no editable install of ours.
    others = [path for path in sys.path if path and Path(path).is_dir() and Path(path).resolve() != ROOT]
    (packages / "others.pth").write_text("\n".join(others))
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Of the files here, in a folder of their own: setuptools takes up again what an older egg-info lists."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.log")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    succeed(sys.executable, "-c", build, folder, cwd=folder / "source")
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """The sdist, unpacked."""
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("fastllm_kernels-*")
    return folder


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory) -> tuple[Path, str]:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    return make_wheel(sdist, tmp_path_factory.mktemp("wheel") / "out", **QUICK)


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The python of an environment with the wheel."""
    return install(built[0], tmp_path_factory.mktemp("installed") / "venv")


def test_the_sdist_holds_what_is_tracked(sdist):
    """All but measured results and the files of the checkout itself."""
    with tarfile.open(sdist) as tar:
        found = {name.partition("/")[2] for member in tar if member.isfile() and (name := member.name)}
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wanted = {n for n in tracked() if not n.startswith(("benchmarks/results/", ".ci/", ".git"))}
    assert wanted - found == set()
    assert found - made - wanted == set()


def test_the_wheel_holds_every_module(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    wanted = {f"fastllm/{p.relative_to(ROOT / 'fastllm')}" for p in (ROOT / "fastllm").rglob("*.py")}
    wanted |= {f"fastllm/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    wanted |= {f"fastllm/benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("*.py")}
    wanted |= {"fastllm/py.typed", "fastllm/kernels/py.typed", *(str(p.relative_to(ROOT)) for p in PAGE.iterdir())}
    code = {name for name in names if ".dist-info/" not in name}
    assert wanted - code == set()
    assert [name for name in code - wanted if not re.fullmatch(r"fastllm/kernels/_C\.\S+\.so", name)] == []
    assert len(code - wanted) == 1


def test_the_metadata(built):
    """Who, what, where; and no requirement that would install the other project or pin the user's torch."""
    archive = zipfile.ZipFile(built[0])
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    found = email.message_from_bytes(archive.read(name))
    assert found["Name"] == "fastllm-kernels"
    for field in ("Version", "Summary", "Author", "Project-URL", "License-Expression", "License-File", "Keywords"):
        assert found[field], field
    classifiers = found.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert not [c for c in classifiers if c.startswith("License ::")]  # the expression says it
    required = found.get_all("Requires-Dist")
    assert not [r for r in required if "==" in r.partition(";")[0] or re.match(r"fastllm(?!-kernels)", r)]
    bare = {re.match(r"[\w-]+", r).group() for r in required if "extra ==" not in r}
    assert bare == {"torch", "triton"}


def test_an_op_runs_from_the_wheel(python, tmp_path):
    assert "ran base" in succeed(python, "-c", CALL, cwd=tmp_path)
    told = " ".join(succeed(python.with_name("fastllm"), "info", cwd=tmp_path).split())
    assert "cpu yes, with base instructions (of base)" in told
    assert f"fastllm 0.1.0 in {python.parents[1]}" in told


def test_without_sources_the_build_stops(source):
    shutil.rmtree(source / "csrc")
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, **QUICK)
    assert done.returncode != 0
    assert "error: there are no C++ sources in" in done.stderr
    assert not list(source.rglob("*.so"))


def test_a_compiler_that_fails_stops_the_build(source, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'error: unknown type name of this compiler' >&2\nexit 1\n")
    compiler.chmod(0o755)
    words = ("wheel", source, "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path / "out")
    done = run(sys.executable, "-m", "pip", *words, cwd=tmp_path, CXX=str(compiler), **QUICK)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert "error: unknown type name of this compiler" in printed
    assert "error: the native module could not be compiled" in printed
    assert not list((tmp_path / "out").glob("*.whl"))
    missing = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, CXX="no-such-compiler", **QUICK)
    assert missing.returncode != 0
    assert "error: CXX is 'no-such-compiler', but there is no program 'no-such-compiler'" in missing.stderr


def test_instruction_sets_are_checked(source):
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, FASTLLM_CPU_ISAS="avx3")
    assert done.returncode != 0
    assert "FASTLLM_CPU_ISAS is 'avx3'; it takes base, avx2" in done.stderr


def test_without_a_compiler(sdist, tmp_path):
    """The wheel builds, the build warns, `fastllm info` says what to do, and the first op on a CPU warns once."""
    (tmp_path / "empty").mkdir()
    wheel, printed = make_wheel(sdist, tmp_path / "out", PATH=str(tmp_path / "empty"))
    assert "WARNING: fastllm was installed WITHOUT its native module: no C++ compiler found." in printed
    python = install(wheel, tmp_path / "venv")
    told = " ".join(succeed(python.with_name("fastllm"), "info", cwd=tmp_path).split())
    assert "cpu no: the native module is missing, see below" in told
    assert "was not built, for want of a C++ compiler or because of FASTLLM_NATIVE=0; install g++ or clang++" in told
    program = tmp_path / "program.py"
    program.write_text("""
import sys, warnings
import torch
from fastllm.kernels import explain, rms_norm, swiglu

x = torch.ones(2, 4)
if "compiled" in sys.argv:
    torch.compile(rms_norm, backend="eager", fullgraph=True)(x)
    swiglu(x, x)
    sys.exit()
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    rms_norm(x.double())  # no kernel would serve it
    explain(rms_norm, x)
    assert not found, found[0]
    for _ in range(3):
        assert rms_norm(x).shape == x.shape
        swiglu(x, x)
(warning,) = found
assert warning.category is RuntimeWarning and warning.filename == __file__, warning
print(warning.message)
print(explain(rms_norm, x))
try:
    rms_norm(x, backend="cpu")
except ValueError as error:
    print(error)
""")
    used = succeed(python, program, cwd=tmp_path)
    assert used.count("was not built, for want of a C++ compiler") == 3
    assert "run as plain PyTorch" in used
    assert "rms_norm: torch" in used
    assert "circular" not in used
    assert succeed(python, program, "compiled", cwd=tmp_path).count("RuntimeWarning: fastllm: ") == 1


def test_a_module_of_another_python_is_named(built, tmp_path):
    python = install(built[0], tmp_path / "venv")
    (module,) = (tmp_path / "venv").rglob("_C.*.so")
    code = "import fastllm; print(fastllm.kernels.native.cpu_missing())"
    module.write_bytes(b"not a library")
    assert "fastllm.kernels._C can't be loaded (" in succeed(python, "-c", code, cwd=tmp_path)
    module.rename(module.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    assert "was built for another Python (_C.cpython-39-" in succeed(python, "-c", code, cwd=tmp_path)


def test_kernels_need_no_numpy(tmp_path):
    """PyTorch warns at import where there is none; we don't."""
    program = tmp_path / "program.py"
    program.write_text("""
import sys

class NoNumpy:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numpy":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoNumpy())
import fastllm
from fastllm.kernels import flash_attention
import torch
q = torch.randn(1, 20, 2, 8, requires_grad=True)
flash_attention(q, q, q, backend="cpu").sum().backward()
assert "numpy" not in sys.modules
try:
    fastllm.Tokenizer
except ModuleNotFoundError as error:
    print(*error.__notes__)
""")
    printed = succeed(sys.executable, "-W", "error", program, cwd=tmp_path)
    assert printed == 'fastllm.Tokenizer needs what this installs: pip install "fastllm-kernels[train]"\n'


# ---- names and types ----

INSTALLS = re.compile(r"pip3? (?:install|download|wheel)\b([^&;`#\n]*)")


def wrong_names(text: str) -> list[str]:
    """Words that would have pip install the other project of the name fastllm."""
    found = re.findall(r"\bfastllm\[[a-z,]+\]", text)
    for words in INSTALLS.findall(text):
        found += re.findall(r"(?<![\w./-])fastllm(?![\w./[-])", words)
    return found


def test_messages_name_our_distribution():
    assert wrong_names('pip install "fastllm[train]"') == ["fastllm[train]"]
    assert wrong_names("`pip install -U fastllm` or pip install fastllm==1") == ["fastllm", "fastllm"]
    assert wrong_names('pip install -e ".[train]" && fastllm train; pip install fastllm-kernels') == []
    assert wrong_names("pip install /src/fastllm/ 'fastllm-kernels[hf]'") == []
    kinds = (".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", "run")
    texts = {name: (ROOT / name).read_text() for name in tracked() if name.endswith(kinds)}
    del texts["tests/test_packaging.py"]
    assert {name: wrong for name, text in texts.items() if (wrong := wrong_names(text))} == {}


def test_extras_are_those_of_the_project():
    from fastllm.errors import DISTRIBUTION
    from fastllm.info import EXTRAS, USED_BY

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    assert set(EXTRAS) == set(USED_BY)
    for extra, packages in EXTRAS.items():
        listed = [re.match(r"[\w-]+", r).group() for r in project["optional-dependencies"][extra]]
        assert [name.replace("-", "_") for name in listed if name != DISTRIBUTION] == list(packages)


def test_lazy_names():
    """`__all__`, the modules and the imports for type checkers agree, and `dir` shows them."""
    import fastllm

    assert set(fastllm.__all__) == {*fastllm._MODULES, "kernels", "__version__"}
    assert set(fastllm.__all__) <= set(dir(fastllm))
    for name, module in fastllm._MODULES.items():
        assert getattr(fastllm, name).__module__.startswith(f"fastllm.{module}")
        assert re.search(rf"    from \.{module} import .*\b{name}\b", Path(fastllm.__file__).read_text())
    assert fastllm.kernels.rms_norm
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastllm.nothing


def test_overloads_are_those_of_the_function():
    """Each says what the function's own signature says, but for the argument that decides and the result."""
    from fastllm.kernels.backends import OPS

    deciding = {"rms_norm": "residual", "linear_log_prob": "return_entropy"}
    overloaded = {name: found for name, op in OPS.items() if (found := typing.get_overloads(op.function))}
    unions = {
        name for name, op in OPS.items() if "tuple" in (text := op.function.__annotations__["return"]) and "|" in text
    }
    assert set(overloaded) == unions
    for name, overloads in overloaded.items():
        decides = deciding.get(name, "return_lse")
        wanted, (*first, last) = inspect.signature(OPS[name].function), map(inspect.signature, overloads)
        assert last == wanted
        for found in first:
            assert [*found.parameters] == [*wanted.parameters]
            rest = [
                (a, b) for a, b in zip(found.parameters.values(), wanted.parameters.values(), strict=True) if a != b
            ]
            assert {a.name for a, _ in rest} == {decides}


def found_by(checker: str, name: str, python: Path, cwd: Path) -> dict[int, str]:
    """What mypy or pyright, strict, finds in the program, by line, against the installed package."""
    shutil.copy(ROOT / "tests" / "typing_cases" / name, cwd)
    if checker == "mypy":
        cache = ROOT / ".mypy_cache" / "user"
        words = ("mypy", "--strict", "--no-pretty", "--python-executable", python, "--cache-dir", cache)
    else:
        (cwd / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        words = ("pyright", "--pythonpath", python)
    done = run(sys.executable, "-m", *words, name, cwd=cwd)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(line): text for line, text in re.findall(rf"{name}:(\d+):(.*error.*)", done.stdout)}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_of_public_calls(checker, python, tmp_path):
    """A program with each public call passes strictly; of wrong calls each is found."""
    wrong = (ROOT / "tests" / "typing_cases" / "wrong.py").read_text().splitlines()
    marked = {number for number, line in enumerate(wrong, 1) if line.endswith("# wrong")}
    assert len(marked) > 15
    assert found_by(checker, "right.py", python, tmp_path) == {}
    assert set(found_by(checker, "wrong.py", python, tmp_path)) == marked
