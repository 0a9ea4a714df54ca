"""What a step does and does not do."""

from __future__ import annotations

import json
import math
import traceback

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.data.loader import IGNORE_INDEX
from fastllm.distributed.mesh import process_group
from fastllm.dtensor import to_full
from fastllm.training.checkpoint import Checkpointer
from fastllm.training.metrics import LOG, MeanMetrics, RunLog, fitting, progress_parts, read_log
from fastllm.training.plot import plot
from tests.fastllm import small_run


class NoWaiting(TorchDispatchMode):
    """Raises where the host would ask the device for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(frame.name == "backward" for frame in traceback.extract_stack(limit=4)):
            return func(*args, **(kwargs or {}))  # on a CPU the loss looks at its factor there, which costs nothing
        if any(op in name for op in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "item")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_wait_for_the_device(optimizer, tmp_path):
    """SpikeDetector, clipping and the skipped update included."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(optimizer=optimizer), tmp_path)
        trainer.train_step()
        with NoWaiting():
            trainer.train_step()
            with pytest.raises(AssertionError, match="waits"):
                trainer.metrics.grad_norm.item()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_model_computes_in(precision, tmp_path):
    """Weights, gradients and the optimizer's state are float32 in any case."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(reshard_after_forward=True), tmp_path, precision)
        seen = []
        for layer in trainer.model.model.layers:
            layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        trainer.train_step()
        assert set(seen) == {precision}
        assert {t.dtype for name, t in trainer.tensors().items() if "random" not in name} == {torch.float32}


def test_ranks_synchronise_by_time_too(tmp_path, monkeypatch):
    """A signal takes effect within seconds, however seldom the log is written: torchrun kills after half a minute."""
    never = 10**6
    with process_group(small_run.CPU):
        config = small_run.config(steps=16, log_every=never, eval_every=never, every=never)
        trainer = small_run.make(config, tmp_path)
        monkeypatch.setattr(trainer.stopwatch, "seconds", lambda: 0.5 * trainer.state.step)
        steps, sync = [], trainer.sync_ranks
        monkeypatch.setattr(trainer, "sync_ranks", lambda: (steps.append(trainer.state.step), sync()))
        trainer.run()
    assert steps == [1, 6, 11, 16]


@pytest.mark.parametrize("slow", [1, 8, 9])
def test_time_that_is_found_to_be_up_ends_the_run_as_its_last_step_does(slow, tmp_path, monkeypatch):
    """With an evaluation and a line of the log, where a step (here the one for the log among them) took too long."""
    never = 10**6
    with process_group(small_run.CPU):
        config = small_run.config(steps=never, seconds=10.0, log_every=8, eval_every=never, every=never)
        trainer = small_run.make(config, tmp_path)
        monkeypatch.setattr(
            trainer.stopwatch, "seconds", lambda: 0.9 * trainer.state.step + 9 * (trainer.state.step >= slow)
        )
        trainer.run()
    records = read_log(tmp_path / LOG)
    assert trainer.state.validation_loss is not None
    assert [r["step"] for r in records if "validation_loss" in r] == [trainer.state.step]
    assert [r["step"] for r in records if "loss" in r][-1] == trainer.state.step


def test_the_loss_is_the_mean_over_the_tokens_that_count(tmp_path):
    """Micro-batches with different numbers of them: as one batch."""
    with process_group(small_run.CPU):
        losses, gradients = [], []
        for size in (1, 5):
            trainer = small_run.make(small_run.config(micro_batch=size), tmp_path / str(size))
            rng = np.random.default_rng(1)
            inputs = rng.integers(0, 259, (5, 16))
            targets = np.where(rng.random((5, 16)) < 0.4, IGNORE_INDEX, inputs[::-1])
            whole = {"tokens": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
            trainer.data.batch = lambda first, n, b=whole: {name: t[first : first + n] for name, t in b.items()}
            kept = {}
            update = torch.optim.AdamW.step
            try:
                torch.optim.AdamW.step = lambda self, trainer=trainer, kept=kept: kept.update(
                    {n: to_full(p.grad).clone() for n, p in trainer.model.named_parameters()}
                )
                trainer.train_step()
            finally:
                torch.optim.AdamW.step = update
            losses.append(trainer.metrics.sums[0].item())
            gradients.append(kept)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_skipped_step_counts_in_the_logged_loss(tmp_path, monkeypatch):
    """The weights stay as they were; the loss was what it was."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(), tmp_path)
        before = [to_full(p).clone() for p in trainer.model.parameters()]
        with torch.no_grad():
            found = [trainer.objective(trainer.model, batch) for batch in trainer._read(0)]
        expected = sum(loss.loss_sum.item() for loss in found) / sum(loss.count.item() for loss in found)
        monkeypatch.setattr(trainer.spikes, "step", lambda step, loss, norm: torch.ones(()))
        trainer.train_step()
        assert all(torch.equal(to_full(p), old) for p, old in zip(trainer.model.parameters(), before, strict=True))
        assert trainer.metrics.pop()["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_in_no_mean():
    metrics = MeanMetrics(("other",), small_run.CPU)
    for loss in (2.0, math.nan, 4.0, math.inf):
        metrics.add(torch.tensor(loss), torch.tensor([1.0]), torch.tensor(0.5))
    assert metrics.pop() == {"loss": 3.0, "other": 1.0, "grad_norm": 0.5}
    assert metrics.pop()["loss"] is None


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_progress_fits_the_terminal(width):
    """The most wanted first, and nothing cut."""
    record = {"loss": 3.4567, "lr": 4e-3, "grad_norm": 1.23, "tokens_per_second": 12_345, "mfu": 0.4, "memory": 2**32}
    parts = progress_parts(record, 3661)
    line = fitting(parts, width - 30)
    assert len(line) <= width - 30
    assert line.startswith("loss 3.457  1:01:01 left")
    assert line == "  ".join(parts[: line.count("  ") + 1])
    assert (line.count("  ") + 1 == len(parts)) == (width == 160)


def test_garbage_in_a_log_is_passed_over(tmp_path):
    lines = [b'{"step": 1, "loss": 2.0}', b"\xff\xfe", b"[1]", b"null", b'{"step": "x"}', b'{"loss": 1}', b"[" * 10**5]
    lines += [b'{"step": 2, "loss": "text"}', b'{"step": 3, "loss": NaN}']
    (tmp_path / LOG).write_bytes(b"\n".join(lines))
    assert [record["step"] for record in read_log(tmp_path / LOG)] == [1, 2, 3]
    plot(tmp_path / LOG, tmp_path / "loss.png", unigram_loss=5.0)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_save_costs_the_loop_a_copy(tmp_path, monkeypatch):
    """Steps go on while a checkpoint is written, and what is written is the state at the time of the save."""
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(every=1, steps=3), tmp_path)
        begun, finished = [], []
        save, wait = Checkpointer.save, Checkpointer.wait
        monkeypatch.setattr(
            Checkpointer, "save", lambda self, *a: (begun.append(trainer.state.step), save(self, *a))[1]
        )
        monkeypatch.setattr(Checkpointer, "wait", lambda self: (finished.append(trainer.state.step), wait(self))[1])
        trainer.run()
        assert begun == [1, 2, 3]
        assert finished == [1, 2, 3, 3]  # each save waits for the one before it, and the end for the last
        kept = {}
        for step in (2, 3):
            tensors = {name: torch.empty_like(t) for name, t in trainer.tensors().items()}
            trainer.checkpoints.load(trainer.checkpoints.manifest(step), tensors)
            kept[step] = tensors
        for name, tensor in trainer.tensors().items():
            assert torch.equal(to_full(kept[3][name]).nan_to_num(-1), to_full(tensor).nan_to_num(-1)), name
        assert not torch.equal(to_full(kept[2]["model.model.norm.weight"]), to_full(kept[3]["model.model.norm.weight"]))


def test_a_torn_log_is_continued(tmp_path):
    (tmp_path / LOG).write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with RunLog(tmp_path, 5, False, enabled=True) as log:
        log.write({"step": 2, "loss": float("nan")})
        log.validated(2, 1.5, {})
    assert read_log(tmp_path / LOG) == [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "validation_loss": 1.5},
    ]  # fmt: skip
    for line in (tmp_path / LOG).read_text().splitlines():
        if not line.endswith('"lo'):
            json.loads(line)


def test_steps_that_were_trained_again_count_once(tmp_path):
    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [{"step": 3, "validation_loss": 9.0}]
    lines += [{"step": s, "loss": 10.0 + s} for s in (2, 3)]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(tmp_path / "log") == [lines[0], *lines[4:]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "muon"}, {"activation_checkpointing": "selective", "reshard_after_forward": True}]
)
def test_on_a_gpu(options, tmp_path, monkeypatch):
    """It learns, does not wait within a step, and goes on bitwise from a checkpoint."""
    monkeypatch.setattr(small_run, "CPU", torch.device("cuda"))
    curves = []
    with process_group(torch.device("cuda")):
        trainer = small_run.make(small_run.config(**options), tmp_path, torch.bfloat16)
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.run()
        assert (trainer.metrics.sums[0] / trainer.metrics.sums[1]).item() < 6 or trainer.state.step == 6
        for _ in range(2):
            again = small_run.make(small_run.config(steps=10, **options), tmp_path, torch.bfloat16)
            again.restore()
            for _ in range(4):
                again.train_step()
            curves.append(torch.stack((again.metrics.sums[0], again.metrics.grad_norm)).tolist())
    assert curves[0] == curves[1]
