"""The table of classes against the installed transformers: what is listed agrees with its kernel, no near miss does."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig

from fastllm.huggingface.patching import table
from fastllm.huggingface.patching.attention import REGISTRY
from fastllm.huggingface.patching.finding import Finding, defining_class, names_in, quietly
from fastllm.huggingface.patching.head import find_loss
from fastllm.huggingface.patching.layers import find_mlp, find_norm
from fastllm.huggingface.patching.rotary import find_rotary

# A class of an older transformers may be another one under the same name: it is left, which is right.
OLDER = Version(transformers.__version__) < Version(table.VERSION)
SINCE_5_8 = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "mixtral")
FILES = sorted({file for file, _ in table.listed()})


class AnyConfig(PreTrainedConfig):
    """Answers what a class may ask for, so that its instance is small, has SiLU and clamps at 10 where it can clamp."""

    def __getattribute__(self, name: str) -> Any:
        try:
            return super().__getattribute__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
        for words, answer in ANSWERS.items():
            if any(word in name for word in words.split()):
                return answer
        raise AttributeError(name)


ANSWERS: dict[str, Any] = {
    "strategy": "default", "token_id": 0, "act": "silu", "bias use_ is_ tie": False, "dropout rate pdrop jitter": 0.0,
    "limits_shared": [10.0], "limit clamp": 10.0, "softcap": None, "eps": 1e-6, "vocab": 32, "pretraining_tp": 1,
    "mlp_multipliers": (1.0, 1.0), "multiplier scal": 1.0, "range": 0.02,
    "sharing_modes": [None], "size dim d_ff alpha": 16, "num": 2,
}  # fmt: skip
ARGUMENTS: list[tuple[Any, ...]] = [
    (16,), (AnyConfig(),), (AnyConfig(), 16), (AnyConfig(), 0), (AnyConfig(), 16, 16), (AnyConfig(), "silu"),
    (16, 16), (16, 16, "silu"), (), (AnyConfig(intermediate_size=[16], activation_sparsity_pattern=[0.0]), 0),
]  # fmt: skip


def instances(kind: type[nn.Module], part: str) -> list[nn.Module]:
    """Small ones; of a model and of an attention, whose constructors differ, bare ones: their parts are stand-ins."""
    if part in ("rotary", "attention", "loss"):
        module = object.__new__(kind)
        nn.Module.__init__(module)
        module.__dict__["config"] = AnyConfig()
        module.config.text_config = module.config
        if SOFTCAP in names_in(kind.forward):
            setattr(module.config, SOFTCAP, 3.0)
        module.__dict__ |= {"vocab_size": 32, "z_loss_coefficient": 0.0}
        module.lm_head = nn.Linear(8, 32, bias=False)
        return [module]
    made = []
    for arguments in ARGUMENTS:
        try:
            made.append(kind(*arguments))
        except Exception:  # its constructor takes others
            continue
    return made


SOFTCAP = "final_logit_softcapping"
FINDERS: dict[str, Callable[..., Finding]] = {
    "norm": find_norm, "mlp": find_mlp, "rotary": find_rotary, "loss": find_loss,
}  # fmt: skip


def classes_in(file: str) -> dict[str, Any]:
    """What the modeling file defines, if the installed transformers has it."""
    if importlib.util.find_spec(file.rpartition(".")[0]) is None or importlib.util.find_spec(file) is None:
        pytest.skip(f"this transformers has no {file}")
    return vars(importlib.import_module(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.rpartition(".")[2].removeprefix("modeling_"))
def test_listed_classes_agree_with_their_kernels(file):
    classes = classes_in(file)
    listed = {name: parts for (where, name), parts in table.listed().items() if where == file and name in classes}
    for name, parts in listed.items():
        kind = classes[name]
        for part, options in parts.items():
            modules = instances(kind, part)
            assert modules, f"{kind.__name__}: made with none of the arguments that are tried"
            if part == "attention":
                asks = REGISTRY in names_in(kind.forward)
                assert asks or OLDER, f"{kind.__name__} does not ask the registry"
                continue
            with quietly():
                found = [FINDERS[part]("", module, None, **options) for module in modules]
            agrees, notes = any(f.replaced for f in found), [f.note for f in found]
            assert agrees or OLDER, f"{kind.__name__}, {part}: {notes}"
            assert agrees or file.split(".")[2] not in SINCE_5_8, f"{kind.__name__}, {part}: {notes}"


def test_lines_are_in_order_and_name_a_class_once():
    lines = [line for line in table.LISTED.strip().splitlines() if not line.startswith(" ")]
    assert lines == sorted(lines, key=lambda line: line.partition(":")[0].partition("/"))
    words = [word for word in table.LISTED.split() if not word.endswith(":")]
    assert len(words) == sum(len({k for f, k in table.listed() if f == file}) for file in FILES)
    parts = {part for word in words for part in word.partition("=")[2].split(",")}
    assert parts == {"norm", "norm+1", "mlp", "rotary", "attention", "loss"}
    both = [key for key in table.near_misses() if key[0] in table.listed().get(key[1:], {})]
    assert not both, "listed and a near miss"


NEAR_MISSES = sorted(key for key in table.near_misses() if key[0] in ("norm", "mlp", "rotary"))


@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: f"{miss[2]}, {miss[0]}")
def test_near_misses_are_left_by_the_probe_too(miss):
    """So that a reason in the table is not one made up."""
    part, file, name = miss
    kind = classes_in(file).get(name)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    modules = instances(kind, part)
    if "GELU" in table.near_misses()[miss]:
        for each in modules:
            each.act_fn = nn.GELU(approximate="tanh")
    assert modules
    with quietly():
        assert OLDER or not any(FINDERS[part]("", each, None).replaced for each in modules)


def test_a_class_above_the_one_that_computes_is_looked_through():
    """fully_shard and others put a subclass above it; a subclass with a forward of its own is another class."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    above = type("FSDPLlamaRMSNorm", (LlamaRMSNorm,), {})(8)
    assert defining_class(above) is LlamaRMSNorm
    assert table.options_of(above) == {"norm": {"weight_offsets": (0.0,)}}
    own = type("Own", (LlamaRMSNorm,), {"forward": lambda self, x: x})(8)
    assert table.options_of(own) == {}


def test_families():
    lines = table.families().splitlines()
    assert lines[0] == "| family | norm | mlp | rotary | attention | loss |"
    assert "| llama | x | x | x | x | x |" in lines
    assert "| gemma2 | x |  | x | x | x |" in lines
    assert len(lines) == 2 + len({file.split(".")[2] for file in FILES})
