"""Worker processes and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastllm.data.workers import starting


def blocked(queue) -> None:
    queue.put(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_a_worker_does_not_get_ctrl_c():
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with starting():
        process = context.Process(target=blocked, args=(queue,))
        process.start()
    assert queue.get()
    process.join()
    assert process.exitcode == 0 and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


ORPHAN = """
import multiprocessing, os, sys, time
from fastllm.data.workers import end_with_parent

def work(path):
    open(path, "w").write(str(os.getpid()))
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    end_with_parent()  # only now
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():
        time.sleep(0.01)
    os._exit(9)
"""


def test_a_worker_whose_parent_was_killed_while_it_started_ends(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    subprocess.run([sys.executable, str(tmp_path / "orphan.py"), str(tmp_path / "pid")], timeout=60)
    number = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_running(number):
        time.sleep(0.02)
    assert not is_running(number)


def is_running(number: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()  # it may be left unreaped
    except OSError:
        return False
