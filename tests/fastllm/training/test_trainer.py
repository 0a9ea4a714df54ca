"""What a step does and does not do."""

from __future__ import annotations

import json
import traceback

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.distributed.mesh import process_group
from fastllm.dtensor import full
from fastllm.training.checkpoint import Checkpoints
from fastllm.training.trainer import IGNORED
from tests.fastllm import small_run as training


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
    """Guard, clipping and the skipped update included."""
    with process_group(training.CPU):
        loop = training.make(training.config(optimizer=optimizer), tmp_path)
        loop.step()
        with NoWaiting():
            loop.step()
            with pytest.raises(AssertionError, match="waits"):
                loop.norm.item()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_model_computes_in(precision, tmp_path):
    """Weights, gradients and the optimizer's state are float32 in any case."""
    with process_group(training.CPU):
        loop = training.make(training.config(reshard=True), tmp_path, precision)
        seen = []
        for layer in loop.model.model.layers:
            layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        loop.step()
        assert set(seen) == {precision}
        assert {t.dtype for name, t in loop.tensors().items() if "random" not in name} == {torch.float32}


def test_the_loss_is_the_mean_over_the_tokens_that_count(tmp_path):
    """Micro-batches with different numbers of them: as one batch."""
    with process_group(training.CPU):
        losses, gradients = [], []
        for size in (1, 5):
            loop = training.make(training.config(micro_batch=size), tmp_path / str(size))
            rng = np.random.default_rng(1)
            inputs = rng.integers(0, 259, (5, 16))
            targets = np.where(rng.random((5, 16)) < 0.4, IGNORED, inputs[::-1])
            loop.batches.batch = lambda first, n, i=inputs, t=targets: (i[first : first + n], t[first : first + n])
            loop.batches.valid_tokens = lambda first, n, t=targets: int((t != IGNORED).sum())
            kept = {}
            update = torch.optim.AdamW.step
            try:
                torch.optim.AdamW.step = lambda self, loop=loop, kept=kept: kept.update(
                    {n: full(p.grad).clone() for n, p in loop.model.named_parameters()}
                )
                loop.step()
            finally:
                torch.optim.AdamW.step = update
            losses.append(loop.sums[0].item())
            gradients.append(kept)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_save_costs_the_loop_a_copy(tmp_path, monkeypatch):
    """Steps go on while a checkpoint is written, and what is written is the state at the time of the save."""
    with process_group(training.CPU):
        loop = training.make(training.config(every=1, steps=3), tmp_path)
        begun, finished = [], []
        save, wait = Checkpoints.save, Checkpoints.wait
        monkeypatch.setattr(Checkpoints, "save", lambda self, *a: (begun.append(loop.at.step), save(self, *a))[1])
        monkeypatch.setattr(Checkpoints, "wait", lambda self: (finished.append(loop.at.step), wait(self))[1])
        loop.run()
        assert begun == [1, 2, 3]
        assert finished == [1, 2, 3, 3]  # each save waits for the one before it, and the end for the last
        kept = {}
        for step in (2, 3):
            tensors = {name: torch.empty_like(t) for name, t in loop.tensors().items()}
            assert loop.checkpoints.load(step, tensors) is None
            kept[step] = tensors
        for name, tensor in loop.tensors().items():
            assert torch.equal(full(kept[3][name]).nan_to_num(-1), full(tensor).nan_to_num(-1)), name
        assert not torch.equal(full(kept[2]["model.model.norm.weight"]), full(kept[3]["model.model.norm.weight"]))


def test_a_log_that_was_cut_off_goes_on(tmp_path):
    from fastllm.training import metrics as report

    (tmp_path / report.LOG).write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with report.Log(tmp_path, 5, False, first=True) as log:
        log.write({"step": 2, "loss": float("nan")})
        log.validated(2, 1.5)
    assert report.read_log(tmp_path / report.LOG) == [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "validation_loss": 1.5},
    ]  # fmt: skip
    for line in (tmp_path / report.LOG).read_text().splitlines():
        if not line.endswith('"lo'):
            json.loads(line)


def test_steps_that_were_trained_again_count_once(tmp_path):
    from fastllm.training import metrics as report

    lines = [{"step": s, "loss": float(s)} for s in (1, 2, 3)] + [{"step": 3, "validation_loss": 9.0}]
    lines += [{"step": s, "loss": 10.0 + s} for s in (2, 3)]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_log(tmp_path / "log") == [lines[0], *lines[4:]]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"recompute": "selective", "reshard": True}])
def test_on_a_gpu(options, tmp_path, monkeypatch):
    """It learns, does not wait within a step, and goes on bitwise from a checkpoint."""
    monkeypatch.setattr(training, "CPU", torch.device("cuda"))
    curves = []
    with process_group(torch.device("cuda")):
        loop = training.make(training.config(**options), tmp_path, torch.bfloat16)
        loop.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        loop.run()
        assert (loop.sums[0] / loop.sums[1]).item() < 6 or loop.at.step == 6
        for _ in range(2):
            again = training.make(training.config(steps=10, **options), tmp_path, torch.bfloat16)
            again.restore()
            for _ in range(4):
                again.step()
            curves.append(torch.stack((again.sums[0], again.norm)).tolist())
    assert curves[0] == curves[1]
