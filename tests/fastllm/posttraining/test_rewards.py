from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm.errors import UserError
from fastllm.posttraining import rewards
from fastllm.posttraining.rewards import RewardPool, Sample, Score

PROMPT = [{"role": "user", "content": "2 + 2?"}]
SOURCE = '''
import ctypes, json, os, subprocess, sys, time
from fractions import Fraction

class Scalar:
    """A 0-d array's way to give its number."""
    ndim = 0
    def item(self):
        return 0.25

def reward(prompt, completion, answer, points=1):
    return points * (prompt[-1]["content"] + completion).endswith(answer)

def everything(**row):
    print("not an answer", flush=True)
    os.write(1, b'{"value": 77}\\n')
    return json.dumps(row, sort_keys=True) == row["completion"]

def meet(completion, other):
    open(completion, "w").close()
    while not os.path.exists(other):
        time.sleep(0.01)
    return os.getpid()

def chunk(completion, big):
    assert sys.stdin.read() == ""
    return len(completion) + len(big)

def act(completion):
    if completion == "hang":
        time.sleep(60)
    if completion == "regex":  # holds the interpreter's lock
        import re
        re.match("(a*)*b", "a" * 40)
    if completion == "grandchild":
        child = subprocess.Popen(["sleep", "60"])
        open("grandchild", "w").write(str(child.pid))
        child.wait()
    if completion == "exit":
        os._exit(3)
    if completion == "sys.exit":
        sys.exit("enough")
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "raise":
        raise ValueError("two\\nlines \\x1b[31m")
    if completion == "long":
        raise ValueError("x" * 10**6)
    return eval(completion)

number = 3
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "graders.py").write_text(SOURCE)
    (folder / "broken.py").write_text("x = 1\ndef reward(:\n")
    (folder / "quits.py").write_text("import sys\nsys.exit(2)\n")
    (folder / "needs.py").write_text("import helpers_that_are_nowhere\n")
    (folder / "crashes.py").write_text("import os\nos._exit(4)\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "beside.py").write_text("VALUE = 5\n")
    (folder / "sub" / "math.py").write_text(
        "import beside, statistics\ndef reward(completion): return beside.VALUE + statistics.mean([1.0, 2.0])\n"
    )
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def samples(*completions: str, **row: object) -> list[Sample]:
    return [Sample(PROMPT, completion, row) for completion in completions]


def pids(pool: RewardPool) -> list[int]:
    return [worker._process.pid for worker in pool._all if worker._process]


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        if sys.platform == "linux":  # an orphan may stay a zombie, in a container
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
    return True


def line_of(text: str) -> str:
    """Where SOURCE has it."""
    return f"graders.py, line {SOURCE[: SOURCE.index(text)].count(chr(10)) + 1}"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scores_are_in_order():
    given = [
        Sample(PROMPT, str(i), {"answer": "?3" if i % 2 else str(i), "points": i, "unused": [1]}) for i in range(9)
    ]
    with RewardPool("graders:reward", workers=3) as pool:
        assert pool.score(given) == [Score(float(i * (i % 2 == 0 or i == 3))) for i in range(9)]
        assert pool.score([]) == []
        (found,) = pool.score(samples("4", unused=1))
        assert found == Score(None, "TypeError: reward() missing 1 required positional argument: 'answer'")


def test_all_keywords_and_what_is_printed(capfd):
    row = {"answer": 'é"\n\ud800', "nested": {"a": [None, 1.5]}}
    with RewardPool("graders.py:everything", workers=1) as pool:
        assert pool.score([Sample(PROMPT, "x", {"completion": "y", **row})] * 2) == [Score(0.0)] * 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("not an answer") == printed.err.count("77") == 2


def test_files_find_what_is_beside_them_and_hide_no_module():
    with RewardPool("sub/math.py:reward", workers=1) as pool:
        assert pool.score(samples("")) == [Score(6.5)]


def test_workers_run_at_once():
    with RewardPool("graders:meet", workers=2, seconds=60) as pool:
        scores = pool.score([Sample(PROMPT, "a", {"other": "b"}), Sample(PROMPT, "b", {"other": "a"})])
        assert {int(score.value) for score in scores} == set(pids(pool))


def test_large_texts():
    size = 3 * 2**20
    with RewardPool("graders:chunk", workers=2) as pool:
        given = [Sample(PROMPT, "é" * size, {"big": "y" * (size + i)}) for i in range(3)]
        assert [score.value for score in pool.score(given)] == [2 * size + i for i in range(3)]


def test_each_problem_ends_one_sample_only():
    problems = {
        "raise": f"'ValueError: two lines \\x1b[31m ({line_of('raise ValueError')})'",
        "1 / 0": f"ZeroDivisionError: division by zero ({line_of('return eval')})",
        "exit": "its process ended: exit status 3",
        "sys.exit": f"SystemExit: enough ({line_of('sys.exit(')})",
        "segfault": "its process ended: SIGSEGV",
        "hang": "took longer than 2 s",
        "regex": "took longer than 2 s",
        "None": "it returned None, not a number",
        "'7'": "it returned a value of type str, not a number",
        "[1]": "it returned a value of type list, not a number",
        "1j": "it returned a value of type complex, not a number",
        "float('nan')": "it returned nan",
        "-float('inf')": "it returned -inf",
        "10**400": "OverflowError: int too large to convert to float",
    }
    values = {"3": 3.0, "True": 1.0, "-0.5": -0.5, "Scalar()": 0.25, "Fraction(1, 2)": 0.5}
    names = [name for pair in zip(problems, list(values) * 3, strict=False) for name in pair]
    with RewardPool("graders:act", workers=2, seconds=2) as pool:
        for name, score in zip(names, pool.score(samples(*names)), strict=True):
            assert score == (Score(None, problems[name]) if name in problems else Score(values[name])), name
        (score,) = pool.score(samples("long"))
        assert 200 < len(score.problem) <= 300 and score.problem.endswith(f"... ({line_of('10**6')})")


def test_numpy_scalars():
    pytest.importorskip("numpy")
    expressions = {"np.float32(0.5)": 0.5, "np.int64(-2)": -2.0, "np.bool_(True)": 1.0, "np.array(4)": 4.0}
    with RewardPool("graders:act", workers=1, seconds=60) as pool:
        for expression, value in expressions.items():
            name = f"__import__('numpy').{expression.removeprefix('np.')}"
            assert pool.score(samples(name)) == [Score(value)]
        (found,) = pool.score(samples("__import__('numpy').zeros(2)"))
        assert found == Score(None, "it returned a value of type ndarray, not a number")


def test_what_a_hanging_function_started_is_killed_too(folder):
    with RewardPool("graders:act", workers=1, seconds=1) as pool:
        assert pool.score(samples("grandchild")) == [Score(None, "took longer than 1 s")]
        pid = int((folder / "grandchild").read_text())
        wait_for(lambda: not running(pid))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("graders", "the reward 'graders' must be MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("graders:", "the reward 'graders:' must be MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("nowhere:f", "the reward 'nowhere:f': ModuleNotFoundError: No module named 'nowhere'"),
        ("no.py:f", "the reward 'no.py:f': there is no file {folder}/no.py"),
        ("graders:missing", "the reward 'graders:missing': graders has no function missing"),
        ("graders:number", "the reward 'graders:number': number is not a function, it is of type int"),
        ("graders:Scalar", "the reward 'graders:Scalar': Scalar has no parameter 'completion'"),
        ("broken.py:reward", "the reward 'broken.py:reward': SyntaxError: invalid syntax (broken.py, line 2)"),
        ("quits:reward", "the reward 'quits:reward': SystemExit: 2 (quits.py, line 2)"),
        ("needs:f", "the reward 'needs:f': ModuleNotFoundError: No module named 'helpers_that_are_nowhere' "
         "(needs.py, line 1)"),
        ("crashes:f", "the reward 'crashes:f' can't be imported: its process ended: exit status 4"),
    ],
)  # fmt: skip
def test_functions_that_are_not_there(folder, spec, message):
    with pytest.raises(UserError) as error:
        RewardPool(spec, workers=1)
    assert str(error.value) == message.format(folder=folder)


def test_an_import_that_does_not_end(folder, monkeypatch):
    (folder / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(rewards, "START_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"'sleeps:f' can't be imported: took longer than 0\.5 s"):
        RewardPool("sleeps:f", workers=2)


def test_wrong_numbers():
    with pytest.raises(UserError, match="at least 1 worker, not 0"):
        RewardPool("graders:act", workers=0)
    with pytest.raises(UserError, match="more than 0 seconds, not -1"):
        RewardPool("graders:act", seconds=-1)


def test_a_worker_that_no_longer_starts(folder):
    (folder / "fleeting.py").write_text("import os\ndef f(completion): os._exit(1) if completion == 'exit' else 1\n")
    with RewardPool("fleeting:f", workers=1) as pool:
        (folder / "fleeting.py").unlink()
        scores = pool.score(samples("exit", "x"))
    assert [score.value for score in scores] == [None, None]
    assert scores[1].problem == "the reward 'fleeting:f': ModuleNotFoundError: No module named 'fleeting'"


# ---- the end ----


def test_close_ends_the_workers():
    threads = threading.active_count()
    with RewardPool("graders:act", workers=2) as pool:
        pool.score(samples("1", "exit", "2"))
        workers = pids(pool)
        assert workers and all(map(running, workers))
    assert not any(map(running, workers)) and not pids(pool)
    assert threading.active_count() == threads
    pool.close()  # again


def test_an_interrupt_gives_up_what_hangs():
    with RewardPool("graders:act", workers=2, seconds=60) as pool:
        start = time.monotonic()
        threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.score(samples(*["hang"] * 5))
        assert pool.score(samples("5", "6")) == [Score(5.0), Score(6.0)]
        workers = pids(pool)
    assert time.monotonic() - start < 20
    assert not any(map(running, workers))


def test_an_interrupt_of_close(monkeypatch):
    pool = RewardPool("graders:act", workers=2)
    workers = pids(pool)

    def interrupted(wait: bool = True, *, cancel_futures: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool._threads, "shutdown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.close()
    wait_for(lambda: not any(map(running, workers)))
    pool.close()
    assert not pids(pool)


def test_close_while_another_thread_scores():
    pool = RewardPool("graders:act", workers=1, seconds=60)
    found: list[list[Score]] = []
    thread = threading.Thread(target=lambda: found.append(pool.score(samples("hang"))))
    thread.start()
    wait_for(lambda: pool._idle.empty())
    pool.close()
    thread.join(20)
    assert found == [[Score(None, "its process ended: SIGKILL")]]


PROGRAM = """
import os, signal, sys, threading
from fastllm.posttraining.rewards import RewardPool, Sample
pool = RewardPool("graders:act", workers=2, seconds=60)
print(*[worker._process.pid for worker in pool._all], flush=True)
{rest}
"""


@pytest.mark.parametrize("completion", ["hang", "regex", None])
def test_workers_end_with_a_parent_that_is_killed(completion):
    score = f"pool.score([Sample([], {completion!r})] * 2)\n" if completion else ""
    program = PROGRAM.format(rest=f"{score}input()")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout
        workers = list(map(int, parent.stdout.readline().split()))
        assert len(workers) == 2 and all(map(running, workers))
        time.sleep(0.3)
        parent.kill()
        wait_for(lambda: not any(map(running, workers)))


def test_a_fork_has_workers_of_its_own():
    rest = """
if (child := os.fork()) == 0:
    print(pool.score([Sample([], "1"), Sample([], "exit"), Sample([], "2")]), flush=True)
    pool.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(pool.score([Sample([], "3")]), flush=True)
if os.fork() == 0:
    pool.close()  # not its own
    os._exit(0)
os.wait()
print(pool.score([Sample([], "4")]), flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(rest=rest)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    pids, *scores = done.stdout.splitlines()
    child = [Score(1.0), Score(None, "its process ended: exit status 3"), Score(2.0)]
    assert scores == [repr(child), repr([Score(3.0)]), repr([Score(4.0)])]
    wait_for(lambda: not any(map(running, map(int, pids.split()))))  # although the program did not close the pool
