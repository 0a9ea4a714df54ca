"""Worker processes and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal

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
