"""New tokens leave the old ones alone, adapters leave the base alone, and peft loads what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastllm.data.tokenizer import Tokenizer
from fastllm.distributed.parallelize import apply_activation_checkpointing
from fastllm.errors import UserError
from fastllm.huggingface.export import export
from fastllm.model.gpt import GPT
from fastllm.model.weights import assembled
from fastllm.posttraining.base import add_adapters, grow_vocabulary, merged_state, trainable_parameters
from fastllm.posttraining.config import ChatDataConfig, LoraConfig, SftConfig
from fastllm.posttraining.run import prepare_model
from fastllm.run_dir import load_metadata, load_run
from fastllm.training.trainer import Trainer

from .small_tune import ALWAYS, MODEL, chats, log, save_run, small_gpt, tokenizer, tune, write_rows

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
NEW = ("<|im_start|>", "<|im_end|>")


# ---- vocabulary ----


def plain() -> Tokenizer:
    return Tokenizer.train(["a b"], 257)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [257, 258, 320])  # of the model: none, one and all new tokens find a place
def test_new_tokens(tied, rows):
    model, before = small_gpt(rows, tie_embeddings=tied), plain()
    logits = model(TOKENS)
    known = {name: p.clone() for name, p in model.state_dict().items()}
    grown, after = grow_vocabulary(model, before, NEW)
    ids = [after.backend.token_to_id(token) for token in NEW]
    assert ids == [257, 258] and after.special_ids == {*before.special_ids, *ids}
    assert grown.config == replace(model.config, vocab_size=max(rows, 259))
    for name, tensor in grown.state_dict().items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor, known[name])
            continue
        old = known[name]
        assert torch.equal(tensor[:257], old[:257])
        torch.testing.assert_close(tensor[257:259], old[:257].mean(0).expand(2, -1))
        assert torch.equal(tensor[259:], old[259:])
    ours = grown(TOKENS)
    assert torch.equal(ours[..., :257], logits[..., :257])
    torch.testing.assert_close(ours[..., 257], logits[..., :257].mean(-1), rtol=1e-4, atol=1e-5)
    assert grow_vocabulary(grown, after, NEW) == (grown, after)


def test_no_new_tokens():
    model, before = small_gpt(272), tokenizer()
    assert grow_vocabulary(model, before, NEW) == (model, before)
    with pytest.raises(UserError, match="a new token must not be empty"):
        grow_vocabulary(model, before, ("",))


def test_a_base_without_chat_tokens_is_tuned(tmp_path):
    base = save_run(tmp_path / "base", small_gpt(257), plain())
    data = write_rows(tmp_path / "chats.jsonl", chats(range(20)))
    tune("sft", base, "--data", data, "--out", tmp_path / "run", "--data.new-tokens", "<|more|>", "--train.steps", 2,
         *ALWAYS)  # fmt: skip
    model, after = load_run(tmp_path / "run")
    assert model.config.vocab_size == after.vocab_size == 260
    assert [after.backend.id_to_token(i) for i in after.eos_ids] == ["<|endoftext|>", "<|im_end|>"]
    assert after.chat_template is not None
    found = load_run(base)
    with pytest.raises(UserError, match=r"lacks the tokens <\|im_start\|>, <\|im_end\|> of its chat template"):
        prepare_model(SftConfig(lora=LoraConfig(4)), *found)


# ---- adapters, by themselves ----

LORA = {"lora": LoraConfig(4), "dora": LoraConfig(4, dora=True), "few": LoraConfig(2, alpha=1.0, targets=("q_proj",))}
SHAPES: dict[str, dict[str, Any]] = {"tied": {}, "qwen": {"qkv_bias": True, "qk_norm": True, "tie_embeddings": False}}


def adapted(config: LoraConfig, dtype: torch.dtype = torch.float32, **shape: Any) -> GPT:
    """With adapters that add something."""
    model = small_gpt(**shape).to(dtype)
    add_adapters(model, config, 0)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            p.data += 0.3 * torch.rand(p.shape, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LORA)
def test_merged_weights_give_the_same_outputs(name, shape):
    model, before = adapted(LORA[name], **SHAPES[shape]), small_gpt(**SHAPES[shape])
    merged = assembled(model.config, merged_state(model.state_dict(), LORA[name]))
    ours, expected = merged(TOKENS), model(TOKENS)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before(TOKENS)).norm() > 0.02 * expected.norm()
    assert merged.state_dict().keys() == before.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LORA)
def test_at_first_they_add_nothing(name, dtype):
    """And are float32 on a base of any dtype, which alone keeps what a step of 1e-4 adds."""
    before = small_gpt().to(dtype)
    model = small_gpt().to(dtype)
    add_adapters(model, LORA[name], 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert trainable_parameters(model) == (sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters()))
    merged = merged_state(model.state_dict(), LORA[name])
    for key, tensor in before.state_dict().items():
        assert merged[key].dtype == dtype
        torch.testing.assert_close(merged[key], tensor, rtol=2**-20 if dtype == torch.float32 else 0, atol=0)


def test_adapters_depend_on_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 17)
        model = small_gpt()
        before = torch.get_rng_state()
        add_adapters(model, LORA["lora"], seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


def test_what_is_recomputed_drops_the_same_inputs():
    """Or the gradient would be that of other adapters than those that gave the loss."""
    gradients = []
    for how in ("none", "full", "selective"):
        model = small_gpt()
        add_adapters(model, LoraConfig(4, dropout=0.5), 0)
        for p in (p for n, p in model.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
        for block in model.model.layers if how != "none" else ():
            apply_activation_checkpointing(block, selective=how == "selective")
        torch.manual_seed(3)
        model(TOKENS, TOKENS).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


# ---- adapters, trained ----

TRAINED = {"lora": (), "dora": ("--lora.dora",)}


class Trained:
    """A run of twelve steps on a base, and the parameters at its end."""

    def __init__(self, folder: Path, dtype: torch.dtype, *more: object) -> None:
        model = small_gpt(attention_dim=64, qkv_bias=True, tie_embeddings=False).to(dtype)
        self.base = save_run(folder / "base", model, tokenizer())
        self.run = folder / "run"
        self.parameters: dict[str, Tensor] = {}
        data = write_rows(folder / "chats.jsonl", chats(range(40)))
        with pytest.MonkeyPatch.context() as patch:
            run = Trainer.run

            def watched(trainer: Trainer) -> bool:
                done = run(trainer)
                self.parameters = {n: t.full_tensor() for n, t in trainer.model.state_dict().items()}
                return done

            patch.setattr(Trainer, "run", watched)
            tune("sft", self.base, "--data", data, "--out", self.run, "--lora.rank", 4, "--train.epochs", 9,
                 "--train.steps", 12, "--optim.lr", 1e-2, *ALWAYS, *more)  # fmt: skip


@pytest.fixture(scope="module", params=[f"{k}, {d}" for k in TRAINED for d in ("float32", "bfloat16")])
def trained(request, tmp_path_factory) -> Trained:
    kind, dtype = request.param.split(", ")
    return Trained(tmp_path_factory.mktemp("lora"), getattr(torch, dtype), *TRAINED[kind])


def test_the_base_is_bitwise_unchanged(trained):
    """And the adapters are not; the merged weights are those that the run folder has."""
    before = load_file(trained.base / "model.safetensors")
    for name, tensor in trained.parameters.items():
        if "lora_" not in name:
            known = before[name.replace(".base_layer.", ".")]
            assert tensor.dtype == known.dtype and torch.equal(tensor, known), name
    moved = [t for name, t in trained.parameters.items() if "lora_B" in name]
    assert len(moved) == 14 and all(t.dtype == torch.float32 and bool(t.any()) for t in moved)
    losses = log(trained.run, "loss")
    assert losses[-1] < losses[0] - 1
    config = LoraConfig(4, dora=any("magnitude" in name for name in trained.parameters))
    merged = merged_state(trained.parameters, config)
    for name, tensor in load_file(trained.run / "model.safetensors").items():
        assert torch.equal(tensor, merged[name]), name
    assert load_metadata(trained.run)["trainable_parameters"] < 0.2 * load_metadata(trained.run)["parameters"]


@torch.no_grad()
def test_peft_loads_the_adapter(trained, tmp_path):
    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        export(trained.base, tmp_path / "hf"), dtype=torch.float32
    )
    before = theirs(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, trained.run / "adapter").eval()
    model = load_run(trained.run)[0].float()
    ours, expected = model(TOKENS), theirs(TOKENS).logits
    rounded = load_run(trained.base)[0].head_weight.dtype == torch.bfloat16  # so are the merged weights
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.1 if rounded else 1e-4)
    assert (expected - before).norm() > (20 if rounded else 1e4) * (ours - expected).norm()


def test_its_checkpoints_have_the_adapters_alone(trained):
    (checkpoint,) = (trained.run / "checkpoints").iterdir()
    (path,) = checkpoint.glob("*.safetensors")
    names = [name for name in load_file(path) if name.startswith("model.")]
    assert names and all("lora_" in name for name in names)


def test_adapters_and_new_tokens_exclude_each_other():
    with pytest.raises(UserError, match=r"data\.new_tokens needs training without lora\.rank"):
        SftConfig(lora=LoraConfig(4), data=ChatDataConfig(new_tokens=("x",)), model=MODEL)
    for options, message in (
        ({"rank": -1}, "lora.rank must not be negative"),
        ({"dora": True}, "lora.dora needs a lora.rank"),
        ({"rank": 1, "targets": ("x",)}, "lora.targets has x; choose from q_proj"),
        ({"rank": 1, "targets": ()}, "lora.targets names no layer"),
        ({"rank": 1, "dropout": 1.0}, "lora.dropout must be"),
    ):
        with pytest.raises(UserError, match=message):
            LoraConfig(**options)
