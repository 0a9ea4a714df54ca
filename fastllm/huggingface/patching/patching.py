"""``patch``: fastllm's kernels in a transformers model instance, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ...errors import UserError, pip_install
from . import table
from .finding import Finding, quietly
from .layers import find_mlp, find_norm, looks_like_mlp, looks_like_norm
from .rotary import find_rotary, looks_rotary
from .swap import Step, steps_of, swap, swap_back, why_not_back

PARTS = ("norm", "mlp", "rotary", "attention", "loss")
_REPORT = "_fastllm_report"  # an attribute of a model that patch() was called on
NOT_LISTED = 'not in the table; patch(model, unknown="probe") tries it'
DISAGREES = "listed, but as configured here, or in this version of transformers, it computes something else"

LooksLike = Callable[[nn.Module], bool]
Find = Callable[..., Finding]


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` replaced and what it left, and why. Print it, or read the two lists."""

    model: str
    replaced: tuple[Finding, ...]
    left: tuple[Finding, ...]
    asked: tuple[Any, ...] = field(default=(), repr=False)  # the parts, and what to do with unknown classes

    def __str__(self) -> str:
        lines = [f"fastllm's kernels in {self.model}:"]
        lines += _table(self.replaced) or ["  none"]
        if self.left:
            lines += ["left as they were:", *_table(self.left)]
        return "\n".join(lines)


def _table(findings: tuple[Finding, ...]) -> list[str]:
    counts = Counter((f.part, f.kind, f.note) for f in findings)
    wide = max((len(kind) for _, kind, _ in counts), default=0)
    order = sorted(counts.items(), key=lambda item: PARTS.index(item[0][0]))
    return [f"  {part:<9} {count:>3} {kind:<{wide}}  {note}" for (part, kind, note), count in order]


def patch(model: nn.Module, *, parts: tuple[str, ...] = PARTS, unknown: str = "leave") -> PatchReport:
    """Put fastllm's kernels into a Hugging Face transformers model, in place.

    A table lists the classes of transformers that the kernels compute (:mod:`fastllm.huggingface.patching.table`).
    Each module of a listed class is first tried against its kernel: on small and large numbers, in training and in
    evaluation mode, in float32 and in its own dtype. Where they differ (another activation in the configuration,
    dropout, a newer version of the class) it is left, and the report says why.

    - ``"norm"``: RMSNorm, with the weight or 1 + the weight: :func:`fastllm.kernels.rms_norm`.
    - ``"mlp"``: ``down(silu(gate) · up)``: :func:`fastllm.kernels.swiglu`. Mixtures of experts are left alone.
    - ``"rotary"``: rotary positions of halves: :func:`fastllm.kernels.rope`.
    - ``"attention"``: by transformers' attention registry: :func:`fastllm.kernels.flash_attention`, with windows,
      softcap, sinks, padding and packed sequences.
    - ``"loss"``: ``model(..., labels=...)`` in training: :func:`fastllm.kernels.linear_cross_entropy`. The output then
      has no logits. They are made, and the loss from them, in eval mode, without labels, with ``logits_to_keep``, and
      with ``model(..., labels=..., skip_logits=False)``; ``skip_logits=True`` saves them in eval mode too.

    Only this instance changes: no class, no function, no configuration and no other model is touched. A patched module
    gets a subclass of its class, of the same name, with another forward; parameters, their names, hooks and checkpoints
    stay as they are. A patched model can be pickled, deep-copied and saved: a copy is patched as well and can be
    unpatched by itself, a checkpoint is that of the unpatched model, and a new model from its configuration is an
    unpatched one.

    No kernel passes over what is done to a module, before or after: with a hook, an adapter, a parametrization, a
    quantized weight or a forward of its own on ``lm_head`` the loss comes from its logits, with any on an activation
    the MLP calls it. ``set_attn_implementation`` takes the place of our attention. A second ``patch`` changes nothing
    and gives the first report.

    Args:
        model: a transformers ``PreTrainedModel``, or a module that holds one (as peft's do).
        parts: those to replace.
        unknown: what to do with a module of a class that the table does not know. ``"leave"`` leaves it and reports
            it. ``"probe"`` tries it too, and takes the kernel where both agree. Only the numbers that were tried are
            then known to agree, so compare the model's outputs before and after.

    Returns:
        A report of what was replaced and what was left, and why.

    Patch before ``torch.compile``; ``fully_shard`` and peft may come before or after. :func:`unpatch` restores the
    model exactly, :func:`patched` does both around a block.

    Raises:
        UserError: transformers is not installed, ``model`` holds no transformers model, it or a part of it is patched
            already with other arguments, a part is unknown, or ``unknown`` is neither "leave" nor "probe".
    """
    not_parts = set(parts) - set(PARTS)
    if not_parts:
        raise UserError(f"patch: unknown parts {', '.join(sorted(not_parts))}; choose from {', '.join(PARTS)}")
    if unknown not in ("leave", "probe"):
        raise UserError(f'patch: unknown={unknown!r}; choose from "leave" and "probe"')
    asked = (tuple(part for part in PARTS if part in parts), unknown)
    if any(_is_patched(m) for m in model.modules()):
        return _first_report(model, asked)
    with quietly():
        findings = [f for f in _look(model, unknown == "probe") if f.part in parts]
    steps: dict[nn.Module, dict[Step, None]] = {}
    for module, step in (each for f in findings for each in f.steps):
        steps.setdefault(module, {})[step] = None
    for module, wanted in steps.items():
        swap(module, tuple(wanted))
    replaced, left = (tuple(f for f in findings if f.replaced is yes) for yes in (True, False))
    report = PatchReport(type(model).__name__, replaced, left, asked)
    vars(model)[_REPORT] = report
    return report


def _first_report(model: nn.Module, asked: tuple[Any, ...]) -> PatchReport:
    """That of the patch() before, but for what was undone since."""
    from transformers import PreTrainedModel

    roots = [m for m in model.modules() if _REPORT in vars(m)]
    inside = {m for root in roots for m in root.modules()}
    outside = [type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel) and m not in inside]
    if len(roots) != 1 or outside or vars(roots[0])[_REPORT].asked != asked:
        what = (
            f"a part of the model is patched already, {outside[0]} is not"
            if outside
            else "the model is patched already"
        )
        raise UserError(f"patch: {what}; fastllm.unpatch(model) first")
    first = vars(roots[0])[_REPORT]
    stands = {f: all(step in steps_of(module) for module, step in f.steps) for f in first.replaced}
    undone = [
        replace(f, steps=(), note="undone since, by set_attn_implementation") for f, yes in stands.items() if not yes
    ]
    return replace(first, replaced=tuple(f for f, yes in stands.items() if yes), left=(*first.left, *undone))


def unpatch(model: nn.Module) -> None:
    """Restore a patched model, all or nothing. Raises UserError where the model is not patched, or
    was wrapped since (by ``fully_shard``, a hook, an assigned forward): undo that first.
    """
    modules = list(model.modules())
    if not any(_is_patched(m) for m in modules):
        raise UserError("unpatch: the model is not patched")
    for module in modules:
        why_not = why_not_back(module) if steps_of(module) else None
        if why_not:
            raise UserError(
                f"unpatch: {why_not}; undo that first"
                " (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
            )
    for module in modules:
        if steps_of(module):
            swap_back(module)
        vars(module).pop(_REPORT, None)


@contextmanager
def patched(model: nn.Module, *, parts: tuple[str, ...] = PARTS, unknown: str = "leave") -> Iterator[PatchReport]:
    """:func:`patch` inside the block, :func:`unpatch` at its end; a model that is patched before it stays so."""
    before = any(_is_patched(m) for m in model.modules())
    report = patch(model, parts=parts, unknown=unknown)
    try:
        yield report
    finally:
        if not before:
            unpatch(model)


def _is_patched(module: nn.Module) -> bool:
    return _REPORT in vars(module) or bool(steps_of(module))


def _look(model: nn.Module, probe: bool) -> list[Finding]:
    try:
        from transformers import PreTrainedModel

        from .attention import find_attention, looks_like_attention
        from .head import find_loss, looks_like_loss
    except ImportError as error:
        raise UserError(f"patch: needs transformers: {pip_install('hf')} ({error})") from None
    modules = dict(model.named_modules())
    models = {name: m for name, m in modules.items() if isinstance(m, PreTrainedModel)}
    if not models:
        raise UserError(f"patch: {type(model).__name__} is no transformers model and holds none")

    def around(name: str, among: dict[str, nn.Module]) -> list[nn.Module]:
        """Those of ``among`` that hold the module of this name, the innermost first."""
        inside = (n for n in among if n == name or not n or name.startswith(n + "."))
        return [among[n] for n in sorted(inside, key=len, reverse=True)]

    def attention(name: str, module: nn.Module, untried: str | None) -> Finding:
        return find_attention(name, module, untried, around(name, models), "attention" in table.options_of(module))

    finders: dict[str, tuple[LooksLike, Find]] = {
        "norm": (looks_like_norm, find_norm),
        "mlp": (looks_like_mlp, find_mlp),
        "rotary": (looks_rotary, find_rotary),
        "attention": (looks_like_attention, attention),
        "loss": (looks_like_loss, find_loss),
    }
    experts = {name: m for name, m in modules.items() if "experts" in m._modules}
    findings = []
    for name, module in modules.items():
        if name in experts:
            findings.append(Finding("mlp", name, type(module).__name__, "a mixture of experts is left alone"))
        elif not around(name, experts):
            found = (_find(part, name, module, *finder, probe) for part, finder in finders.items())
            findings += [f for f in found if f is not None]
    # A model makes one mask for all its attentions: all or none.
    left = [around(f.name, models)[:1] for f in findings if f.part == "attention" and not f.replaced]
    mixed = {owner for owners in left for owner in owners}
    return [_unless_mixed(f) if mixed.intersection(around(f.name, models)[:1]) else f for f in findings]


def _find(part: str, name: str, module: nn.Module, looks_like: LooksLike, find: Find, probe: bool) -> Finding | None:
    options = table.options_of(module).get(part)
    if options is not None:
        finding = find(name, module, None, **options)
        return replace(finding, note=f"{DISAGREES}: {finding.note}") if finding.disagrees else finding
    if not looks_like(module):
        return None
    why_not = table.why_left(part, module)
    return (
        Finding(part, name, type(module).__name__, why_not)
        if why_not
        else find(name, module, None if probe else NOT_LISTED)
    )


def _unless_mixed(finding: Finding) -> Finding:
    if finding.part != "attention" or not finding.replaced:
        return finding
    return replace(finding, note="another attention of the model is left, and they share a mask", steps=())
