"""Models from Hugging Face folders, against transformers itself on small random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastllm
from fastllm.data.tokenizer import EOS_TOKEN, Tokenizer
from fastllm.errors import UserError
from fastllm.huggingface.load import model_config
from fastllm.inference import Engine
from fastllm.model.weights import save_weights

from .folders import LLAMA3, SIZES, THEIRS, TOKENIZER, YARN, assert_same_logits, their_model

theirs = pytest.mark.parametrize("name", THEIRS)


@theirs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained(name, dtype, tmp_path):
    their_model(name).to(dtype).save_pretrained(tmp_path)
    model, gpt = AutoModelForCausalLM.from_pretrained(tmp_path), fastllm.from_pretrained(tmp_path)
    assert gpt.head_weight.dtype == dtype
    assert not gpt.training
    assert_same_logits(gpt, model)


@theirs
def test_older_configurations(name, tmp_path):
    """As transformers 4 wrote them."""
    their_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config, expected = json.loads(path.read_text()), model_config(path)
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config.pop("layer_types", None)
    if expected.attention_dim == 0:
        config["head_dim"] = None
    path.write_text(json.dumps(config))
    assert model_config(path) == expected


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_keys_that_are_left_out(kind, tmp_path):
    """They are what transformers takes them to be."""
    config = {key: SIZES[key] for key in list(SIZES)[:4]} | {"num_attention_heads": 32, "use_sliding_window": True}
    path, theirs = tmp_path / "config.json", getattr(transformers, f"{kind}Config")(**config, max_window_layers=0)
    path.write_text(json.dumps(config | {"model_type": kind.lower(), "max_window_layers": 0}))
    own = model_config(path)
    assert own.max_seq_len == theirs.max_position_embeddings
    assert own.kv_heads == theirs.num_key_value_heads
    assert own.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert own.window == (getattr(theirs, "sliding_window", None) or 0)
    assert own.norm_eps == theirs.rms_norm_eps
    assert own.rope_theta == theirs.rope_parameters["rope_theta"]
    assert own.tie_embeddings is theirs.tie_word_embeddings
    path.write_text(json.dumps(config | {"model_type": kind.lower(), "num_key_value_heads": None}))
    assert model_config(path).kv_heads == 32


def test_the_original_context_beside_the_scaling(tmp_path):
    """As transformers has it: this key goes before that of the scaling."""
    their_model("llama, yarn").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"original_max_position_embeddings": 12}))
    assert model_config(path).rope_original_max_seq_len == 12
    assert_same_logits(fastllm.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_the_older_scaling_goes_first(tmp_path):
    """As in transformers, where a file has both kinds of keys."""
    their_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert model_config(path).rope_scaling == "linear"
    assert_same_logits(fastllm.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_tied_head_that_is_in_the_file(tmp_path):
    """Files that were once pickled have it; transformers does not tie one that differs."""
    model = their_model("llama, tied")
    model.save_pretrained(tmp_path)
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    assert "lm_head.weight" in tensors
    save_weights(tmp_path / "model.safetensors", tensors)
    assert_same_logits(fastllm.from_pretrained(tmp_path), model)
    tensors["lm_head.weight"][7, 7] += 1
    save_weights(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding"):
        fastllm.from_pretrained(tmp_path)


def test_older_weights_and_mixed_ones(tmp_path):
    """Tables of angles in the file are not needed; weights of two dtypes are brought to one, which the caller names."""
    model = their_model("llama")
    model.save_pretrained(tmp_path)
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    file, norm = tmp_path / "model.safetensors", "model.norm.weight"
    save_weights(file, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert_same_logits(fastllm.from_pretrained(tmp_path), model)
    save_weights(file, {name: t.float() if name == norm else t.bfloat16() for name, t in tensors.items()})
    with pytest.raises(UserError, match=r"of several dtypes \(torch\.bfloat16, torch\.float32\): pass dtype"):
        fastllm.from_pretrained(tmp_path)
    assert fastllm.from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_sharded_files(tmp_path):
    model = their_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(fastllm.from_pretrained(tmp_path), model)


def test_a_shorter_max_seq_len(tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    gpt = fastllm.from_pretrained(tmp_path, max_seq_len=16, dtype=torch.bfloat16)
    assert gpt.model.cos.shape == (16, 8)
    assert gpt.model.cos.dtype == torch.float32
    assert gpt.head_weight.dtype == torch.bfloat16
    for context in (0, 97):
        with pytest.raises(UserError, match="max_seq_len must be from 1 to the 96"):
            fastllm.from_pretrained(tmp_path, max_seq_len=context)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; fastllm's GPT reads llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": None, "max_position_embeddings": 0}, "how large these are: hidden_size, max_position_"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor of rope scaling 'llama3' is 2"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor of rope scaling 'yarn' is 1"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate of rope scaling 'yarn' is False"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "mscale of rope scaling 'yarn' is 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention of rope scaling 'default' is {"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling 'linear' lacks its factor"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "config.json: model.rope_factor must be at least 1"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "some layers have a window and some have none",
        ),
        ({"num_attention_heads": 3}, "config.json: model.heads (3) must be a multiple of"),
    ],
)  # fmt: skip
def test_what_the_gpt_does_not_have(change, words, tmp_path):
    their_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        fastllm.from_pretrained(tmp_path)
    assert words in str(error.value)


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder Qwen/Qwen3-0\.6B \(hf download"):
        fastllm.from_pretrained("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match=r"can't read .*config\.json: No such file"):
        fastllm.from_pretrained(tmp_path)
    their_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors$"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="its weights are pickled: have transformers load and save_pretrained"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="names no files beside it"):
        fastllm.from_pretrained(tmp_path)
    weights.write_bytes(content[:1000])
    with pytest.raises(UserError, match="can't read the weights"):
        fastllm.from_pretrained(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lacks model\.layers\.2"):
        fastllm.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        fastllm.from_pretrained(tmp_path)


@pytest.fixture
def their_folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, which puts a token before each text, as Llama 3's does, and ends in another."""
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str().replace(EOS_TOKEN, "<|end|>"))
    tokenizer.add_special_tokens(["<|begin|>"])
    begin, end = tokenizer.token_to_id("<|begin|>"), tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    wrapped.save_pretrained(tmp_path / "theirs")
    ids = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": begin, "eos_token_id": end}
    their_model("llama", **ids).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_text_of_their_folder(their_folder):
    tokenizer, prompt = AutoTokenizer.from_pretrained(their_folder), "def add(a, b):\n    naïve = 日本"
    model, own = fastllm.load(their_folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert own.encode(prompt) == inputs.input_ids[0].tolist()
    assert own.encode("") == [tokenizer.bos_token_id]
    assert own.eos_ids == (tokenizer.eos_token_id,)
    made = AutoModelForCausalLM.from_pretrained(their_folder).generate(
        **inputs, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(made[0, inputs.input_ids.shape[1] :])
    found = Engine(model, own).generate([prompt], max_tokens=12, temperature=0)[0].text
    assert found == text.removesuffix("<|end|>")


def prefix_space(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def padded(content: dict) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    content |= json.loads(tokenizer.to_str())


def template(single: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        ids = {token["content"]: token["id"] for token in content["added_tokens"]}
        processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
        content["post_processor"] = json.loads(processor.__getstate__())

    return change


def stripping(content: dict) -> None:
    """An added token that is no special one takes the spaces around it."""
    token = content["added_tokens"][0]
    added = {"id": token["id"] + 2000, "content": "naïve", "lstrip": True, "rstrip": True, "special": False}
    content["added_tokens"].append(token | added)


@pytest.mark.parametrize(
    "change",
    [
        padded,
        prefix_space,
        stripping,
        template("$A"),
        template("<|begin|> $A <|end|>"),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(post_processor=json.loads(processors.ByteLevel().__getstate__())),
    ],
    ids=["truncation and padding", "prefix space", "stripping", "template without", "template with two",
         "NFC", "lower case", "ByteLevel"],
)  # fmt: skip
def test_ids_are_those_of_transformers(change, their_folder):
    """Whatever tokenizer.json asks for, but that a special token within a text is text."""
    path = their_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    theirs, own = AutoTokenizer.from_pretrained(their_folder), Tokenizer.load(path, eos_ids=(0,))
    for text in ("", "a", " ", "def add(a, b):  \n   naïve  = 日本 Nai\u0308ve ", "x" * 500):
        assert own.encode(text) == theirs(text)["input_ids"]
    added = len(own.encode(""))
    assert len(theirs("<|end|>")["input_ids"]) == added + 1
    assert own.decode(own.encode("<|end|>")[bool(added) :]).startswith("<|end|>") or change is prefix_space
    assert len(own.encode("<|end|>")) > added + 1


def test_a_tokenizer_of_another_model(their_folder):
    """Where the weights say which tokenizer they had."""
    path, weights = their_folder / "tokenizer.json", their_folder / "model.safetensors"
    fingerprint = fastllm.load(their_folder)[1].fingerprint
    save_weights(weights, fastllm.from_pretrained(their_folder).state_dict(), {"tokenizer": fingerprint})
    fastllm.load(their_folder)
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"the weights {weights} were trained with another tokenizer than {path}"):
        fastllm.load(their_folder)


def test_small_vocabularies(tmp_path):
    """Of characters, say: only a tokenizer that is trained has all bytes."""
    model = their_model("llama", vocab_size=37)
    model.save_pretrained(tmp_path)
    assert_same_logits(fastllm.from_pretrained(tmp_path), model)


def test_tokenizers_that_do_not_fit(their_folder):
    sentences = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    sentences.add_special_tokens(["<|end|>"])
    sentences.decoder = decoders.Metaspace()
    sentences.save(str(their_folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json is no byte-level BPE, as GPT-2's, Llama 3's and Qwen's are"):
        fastllm.load(their_folder)
    larger = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    larger.add_tokens([f"word {i}" for i in range(100)])
    larger.save(str(their_folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json has \d+ tokens, but vocab_size in config\.json is \d+"):
        fastllm.load(their_folder)
    (their_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        fastllm.load(their_folder)
