"""``patch``: fastllm's kernels in a transformers model instance, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import UserError
from .finding import Change, Finding
from .layers import find_mlp, find_norm, find_rotary

PARTS = ("norm", "mlp", "rotary", "attention", "loss")
_DONE = "_fastllm_patch"  # the attribute of a patched model that says how to restore it


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` replaced and what it left, and why. Print it, or read the two lists."""

    model: str
    replaced: tuple[Finding, ...]
    left: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = [f"fastllm's kernels in {self.model}:"]
        lines += _table(self.replaced) or ["  none: nothing in it has the structure of what they compute"]
        if self.left:
            lines += ["left as they were:", *_table(self.left)]
        return "\n".join(lines)


def _table(findings: tuple[Finding, ...]) -> list[str]:
    counts = Counter((f.part, f.kind, f.note) for f in findings)
    wide = max((len(kind) for _, kind, _ in counts), default=0)
    order = sorted(counts.items(), key=lambda item: PARTS.index(item[0][0]))
    return [f"  {part:<9} {count:>3} {kind:<{wide}}  {note}" for (part, kind, note), count in order]


@dataclass(frozen=True)
class _Restore:
    """The attribute of a module as it was before, and as it was made."""

    module: nn.Module
    attribute: str
    was_there: bool
    before: Any
    after: Any


def patch(model: nn.Module, *, parts: tuple[str, ...] = PARTS) -> PatchReport:
    """Put fastllm's kernels into a Hugging Face transformers model, in place.

    Only this instance changes: forwards are bound to its modules, and no class, function or other model is touched.
    Parameters, their names, hooks and checkpoints stay as they are. What a module computes decides, not what it
    is called: each candidate is tried on random numbers against its kernel, and left where they differ.

    - ``"norm"``: RMSNorm, with the weight or 1 + the weight: :func:`fastllm.kernels.rms_norm`.
    - ``"mlp"``: ``down(silu(gate) · up)``: :func:`fastllm.kernels.swiglu`. Mixtures of experts are left alone.
    - ``"rotary"``: rotary positions of halves: :func:`fastllm.kernels.rope`.
    - ``"attention"``: by transformers' attention registry: :func:`fastllm.kernels.flash_attention`, with windows,
      softcap, sinks, padding and packed sequences.
    - ``"loss"``: ``model(..., labels=...)`` in training: :func:`fastllm.kernels.linear_cross_entropy`. The output then
      has no logits. They are made, and the loss from them, in eval mode, without labels, with ``logits_to_keep``, and
      with ``model(..., labels=..., skip_logits=False)``; ``skip_logits=True`` saves them in eval mode too.

    Args:
        model: a transformers ``PreTrainedModel``, or a module that holds one (as peft's do).
        parts: those to replace.

    Returns:
        A report of what was replaced and what was left, and why.

    Patch before ``torch.compile``; ``fully_shard`` and peft may come before or after. :func:`unpatch` restores the
    model exactly, :func:`patched` does both around a block.

    Raises:
        UserError: transformers is not installed, ``model`` holds no transformers model, is patched already, or a part
            is unknown.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UserError(f"patch: unknown parts {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if any(_DONE in m.__dict__ for m in model.modules()):
        raise UserError("patch: the model is patched already; fastllm.unpatch(model) first")
    findings = [f for f in _look(model) if f.part in parts]
    restores: list[_Restore] = []
    for change in {(id(c.module), c.attribute): c for f in findings for c in f.changes}.values():
        restores.append(_made(change))
    object.__setattr__(model, _DONE, restores)
    replaced = tuple(f for f in findings if f.changes)
    return PatchReport(type(model).__name__, replaced, tuple(f for f in findings if not f.changes))


def unpatch(model: nn.Module) -> None:
    """Restore a patched model, all or nothing. Raises UserError where it is not patched, or was wrapped since."""
    holder = next((m for m in model.modules() if _DONE in m.__dict__), None)
    if holder is None:
        raise UserError("unpatch: the model is not patched")
    restores: list[_Restore] = holder.__dict__[_DONE]
    for r in restores:
        if r.module.__dict__.get(r.attribute) is not r.after:
            raise UserError(
                f"unpatch: the {r.attribute} of a {type(r.module).__name__} was replaced after patch(); undo that first"
                " (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
    for r in restores:
        if r.was_there:
            setattr(r.module, r.attribute, r.before)
        else:
            delattr(r.module, r.attribute)
    delattr(holder, _DONE)


@contextmanager
def patched(model: nn.Module, *, parts: tuple[str, ...] = PARTS) -> Iterator[PatchReport]:
    """:func:`patch` inside the block, :func:`unpatch` at its end."""
    report = patch(model, parts=parts)
    try:
        yield report
    finally:
        unpatch(model)


def _made(change: Change) -> _Restore:
    module, attribute = change.module, change.attribute
    was_there, before = attribute in module.__dict__, module.__dict__.get(attribute)
    setattr(module, attribute, change.value)
    return _Restore(module, attribute, was_there, before, change.value)


def _look(model: nn.Module) -> list[Finding]:
    try:
        from transformers import PreTrainedModel

        from .attention import find_attention
        from .head import find_loss
    except ImportError as error:
        raise UserError(f'patch: needs transformers: pip install "fastllm[hf]" ({error})') from None
    modules = dict(model.named_modules())
    models = {name: m for name, m in modules.items() if isinstance(m, PreTrainedModel)}
    if not models:
        raise UserError(f"patch: {type(model).__name__} is no transformers model and holds none")

    def around(name: str, among: dict[str, nn.Module]) -> nn.Module | None:
        """The innermost of ``among`` that holds the module of this name."""
        inside = (n for n in among if n == name or not n or name.startswith(n + "."))
        return among.get(max(inside, key=len, default=None))

    experts = {name: m for name, m in modules.items() if "experts" in m._modules}
    finders: list[Callable[[str, nn.Module], Finding | None]] = [
        find_norm, find_mlp, find_rotary,
        lambda name, module: find_attention(name, module, around(name, models)), find_loss,
    ]  # fmt: skip
    findings = []
    for name, module in modules.items():
        if name in experts:
            findings.append(Finding("mlp", name, type(module).__name__, "a mixture of experts is left alone"))
        elif around(name, experts) is None:
            findings += [f for f in (find(name, module) for find in finders) if f is not None]
    # A model makes one mask for all of its attentions: all or none.
    mixed = {id(around(f.name, models)) for f in findings if f.part == "attention" and not f.changes}
    return [_unless_mixed(f, id(around(f.name, models)) in mixed) for f in findings]


def _unless_mixed(finding: Finding, mixed: bool) -> Finding:
    if finding.part != "attention" or not finding.changes or not mixed:
        return finding
    return replace(finding, note="another attention of the model is left, and they share a mask", changes=())
