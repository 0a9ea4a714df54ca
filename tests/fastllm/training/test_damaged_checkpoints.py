"""What is read is what was written, all of it; else the checkpoint before it is taken, and nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllm import console
from fastllm.distributed.mesh import process_group
from fastllm.dtensor import to_local
from fastllm.errors import UserError
from fastllm.training import checkpoint
from fastllm.training.checkpoint import CHECKSUM, MANIFEST, Checkpointer
from tests.fastllm import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Six steps, with a checkpoint of every second."""
    out = tmp_path_factory.mktemp("run")
    with process_group(small_run.CPU):
        small_run.trace(small_run.config(), out)
    return out


@pytest.fixture
def checkpoints(run, tmp_path) -> Path:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restored(checkpoints: Path, monkeypatch) -> tuple[int | None, dict[str, torch.Tensor], str]:
    """The step, the weights, and what was said."""
    said: list[str] = []
    monkeypatch.setattr(console, "say", lambda label, text: said.append(text))
    with process_group(small_run.CPU):
        trainer = small_run.make(small_run.config(), checkpoints.parent)
        step = trainer.restore()
        weights = {name: to_local(tensor).clone() for name, tensor in trainer.model.state_dict().items()}
        assert step is None or trainer.state.step == step
    return step, weights, "\n".join(said)


def rewrite(folder: Path, change: Callable[[dict], None], checksum: bool = True) -> None:
    """Change the manifest; ``checksum``: as one who knows the format would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if checksum:
        manifest[CHECKSUM] = checkpoint._checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def shard(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_a_tensor(folder: Path) -> None:
    """The file and its entry agree; what the model needs is not in it."""
    tensors = load_file(shard(folder))
    tensors.pop("model.model.norm.weight")
    save_file(tensors, shard(folder))
    rewrite(folder, lambda m: m["files"].update({shard(folder).name: checkpoint._entry(shard(folder))}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty manifest": lambda f: (f / MANIFEST).write_bytes(b""),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "cut manifest": lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:200]),
    "manifest is a list": lambda f: (f / MANIFEST).write_text("[]"),
    "deep manifest": lambda f: (f / MANIFEST).write_text('{"a":' * 100_000),
    "manifest is not UTF-8": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"),
    "manifest is a pipe": lambda f: fifo(f / MANIFEST),
    "manifest is a folder": lambda f: folder_instead(f / MANIFEST),
    "a digit changed": lambda f: rewrite(f, lambda m: m["state"].update(items=31), checksum=False),
    "no checksum": lambda f: rewrite(f, lambda m: m.pop(CHECKSUM), checksum=False),
    "no files": lambda f: rewrite(f, lambda m: m.update(files={})),
    "files is a list": lambda f: rewrite(f, lambda m: m.update(files=[1])),
    "an entry is null": lambda f: rewrite(f, lambda m: m["files"].update(x=None)),
    "an endless device": lambda f: rewrite(f, lambda m: m["files"].update({"/dev/zero": {"bytes": 1, "sha256": ""}})),
    "a file elsewhere": lambda f: rewrite(f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
    "another step": lambda f: rewrite(f, lambda m: m.update(step=4)),
    "a bit changed": lambda f: flip(shard(f)),
    "cut file": lambda f: os.truncate(shard(f), 1000),
    "no file": lambda f: shard(f).unlink(),
    "the file is a pipe": lambda f: fifo(shard(f)),
    "the file is a folder": lambda f: folder_instead(shard(f)),
    "a tensor is missing": without_a_tensor,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name, run, checkpoints, monkeypatch):
    DAMAGES[name](checkpoints / "step-00000006")
    step, weights, said = restored(checkpoints, monkeypatch)
    assert step == 4
    assert f"{checkpoints / 'step-00000006'} is damaged: " in said
    assert "using the one before it" in said
    expected = load_file(shard(run / "checkpoints" / "step-00000004"))
    assert all(torch.equal(weights[name], expected[f"model.{name}"]) for name in weights)


WRONG = {
    "a list": lambda m: m.update(state=[]),
    "no state": lambda m: m.pop("state"),
    "a field is missing": lambda m: m["state"].pop("items"),
    "a word": lambda m: m["state"].update(items="x"),
    "null": lambda m: m["state"].update(seconds=None),
    "negative": lambda m: m["state"].update(items=-1),
    "not finite": lambda m: m["state"].update(seconds=float("nan")),
    "a fraction": lambda m: m["state"].update(spikes=1.5),
    "true": lambda m: m["state"].update(rollbacks=True),
    "a loss that is a word": lambda m: m["state"].update(validation_loss="x"),
    "another step": lambda m: m["state"].update(step=4),
    "a model that is a list": lambda m: m.update(model=[]),
    "data that is null": lambda m: m.update(data=None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_is_none(name, checkpoints, monkeypatch):
    """With the right checksum."""
    rewrite(checkpoints / "step-00000006", WRONG[name])
    with pytest.raises(UserError, match="the checkpoint of step 6 was written by another version of fastllm"):
        restored(checkpoints, monkeypatch)


def test_none_is_intact(checkpoints, monkeypatch):
    for folder in checkpoints.iterdir():
        flip(shard(folder))
    assert restored(checkpoints, monkeypatch)[0] is None


def test_a_file_that_the_manifest_does_not_list_is_not_read(run, checkpoints, monkeypatch):
    folder = checkpoints / "step-00000006"
    tensors = {name: torch.zeros_like(t) for name, t in load_file(shard(folder)).items()}
    for name in ("zzz.safetensors", "aaa.safetensors"):
        save_file(tensors, folder / name)
    step, weights, _ = restored(checkpoints, monkeypatch)
    assert step == 6
    assert all(bool(tensor.any()) for tensor in weights.values())


def test_other_things_in_the_folder_do_no_harm(checkpoints, monkeypatch, tmp_path):
    """What Finder, NFS and people leave; a checkpoint that lies on another disk."""
    (tmp_path / "elsewhere").mkdir()
    os.replace(checkpoints / "step-00000006", tmp_path / "elsewhere" / "six")
    (checkpoints / "step-00000006").symlink_to(tmp_path / "elsewhere" / "six")
    (checkpoints / ".DS_Store").write_bytes(b"x")
    (checkpoints / ".nfs000000000000").write_bytes(b"x")
    (checkpoints / ".link").symlink_to(tmp_path / "elsewhere")
    (checkpoints / ".step-00000008.1234.old").symlink_to(tmp_path / "elsewhere")
    (checkpoints / "notes.txt").write_text("x")
    (checkpoints / "step-00000009").write_text("a file")
    (checkpoints / "step-00000010").symlink_to(tmp_path / "nowhere")
    assert restored(checkpoints, monkeypatch)[0] == 6
    assert (checkpoints / ".DS_Store").exists()
    assert (tmp_path / "elsewhere" / "six" / MANIFEST).exists()
    assert not (checkpoints / ".step-00000008.1234.old").is_symlink()


# ---- rotation ----


def save(folder: Path, keep: int, *steps: int) -> None:
    with process_group(small_run.CPU):
        checkpoints = Checkpointer(folder, keep)
        for step in steps:
            assert checkpoints.save(step, {"t": torch.full((4,), float(step))}, {}) is None
        assert checkpoints.wait() is None


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.iterdir())


def test_damaged_checkpoints_take_no_place(tmp_path):
    """Of the last steps, as after a run went on from the one before them; and of steps before."""
    save(tmp_path, 9, 10, 20, 30, 40)
    flip(shard(tmp_path / "step-00000040"))
    (tmp_path / "step-00000020" / MANIFEST).unlink()
    save(tmp_path, 3, 35)
    assert steps_in(tmp_path) == [10, 30, 35]


def test_the_old_one_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    """Whenever the process ends, a complete checkpoint has its name, or gets it back."""
    save(tmp_path, 1, 10)
    for calls in range(12):
        copy = tmp_path / f"run-{calls}"
        shutil.copytree(tmp_path / "step-00000010", copy / "step-00000010")
        with monkeypatch.context() as patched:
            count = iter(range(99))

            def dying(name: str, count=count, calls=calls):
                real = getattr(os, name)

                def call(*args, **kwargs):
                    if "step-" in str(args[0]) and next(count) >= calls:
                        raise OSError("killed")  # from here on nothing is written
                    return real(*args, **kwargs)

                return call

            for name in ("replace", "unlink", "rmdir"):
                patched.setattr(os, name, dying(name))
            with process_group(small_run.CPU):
                checkpoints = Checkpointer(copy, keep=1)
                for step in (10, 20):
                    checkpoints.save(step, {"t": torch.full((4,), 1.0 + step)}, {})
                checkpoints.wait()
        with process_group(small_run.CPU):
            checkpoints = Checkpointer(copy, keep=1)
            last = checkpoints.steps()[-1]
            tensors = {"t": torch.zeros(4)}
            checkpoints.load(checkpoints.manifest(last), tensors)
            assert tensors["t"][0] in (10.0, 11.0, 21.0)
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with process_group(small_run.CPU), pytest.raises(UserError, match=r"can't use .*checkpoints: File exists"):
        small_run.make(small_run.config(), tmp_path)
