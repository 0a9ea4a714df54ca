"""Models of transformers that fastllm's GPT does not cover, through the same command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastllm.errors import UserError
from fastllm.evaluation import Generation, Options, Scored, ask, find_tasks, load_model, prepare

from . import small

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    "gemma2": lambda v: transformers.Gemma2Config(
        vocab_size=v, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=8, query_pre_attn_scalar=16,
        final_logit_softcapping=3.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=[*CONFIGS])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = small.model().tokenizer
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    config = CONFIGS[request.param](tokenizer.vocab_size)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = tokenizer.eos_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, torch.device("cpu"), torch.float32)


def test_scores(folder, model):
    """Against the unpatched model on each sequence alone, padded batches or not."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sequences = [Scored([1, 2, 3, 4, 5][: 2 + i % 4], 1 + i % 2) for i in range(9) if i % 4 or not i % 2]
    sequences += [Scored([9, 8, *range(i), 7], 2) for i in range(20)] + [Scored([1, 2, 3, i], 3) for i in range(5)]
    for rows in (8, 2048):
        model.rows = rows
        found = dict(pair for _, scores in model.score(sequences) for pair in scores)
        assert sorted(found) == [*range(len(sequences))]
        for place, (tokens, start) in enumerate(sequences):
            with torch.no_grad():
                logits = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)[start - 1 : -1]
            targets = torch.tensor(tokens[start:])
            assert found[place].log_prob == pytest.approx(float(logits.gather(1, targets[:, None]).sum()), abs=2e-4)
            assert found[place].greedy == bool((logits.argmax(1) == targets).all())
    assert model.plan([Scored([1, 2, 3, i], 3) for i in range(5)]) == 3


def test_answers(folder, model):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    plain = dict(model.generate(prompts, Generation(max_tokens=6)))
    for place, prompt in enumerate(prompts):
        tokens = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
        end = tokens.index(model.tokenizer.eos_id) if model.tokenizer.eos_id in tokens else len(tokens)
        assert plain[place] == model.tokenizer.decode(tokens[:end])
    word = plain[0][1:3]
    stopped = dict(model.generate(prompts, Generation(max_tokens=6, stop=(word,))))
    assert stopped[0] == plain[0][: plain[0].find(word)]


def test_tasks(tmp_path, model):
    small.write_mmlu(tmp_path, ["anatomy"])
    (task,) = find_tasks(["mmlu"], ("anatomy",))
    made = prepare(task, tmp_path, model.tokenizer, model.max_seq_len, Options(too_long="truncate"))
    assert len(ask(model, made)) == 3


def test_settings_of_generation_in_the_folder_do_not_count(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    settings = {"repetition_penalty": 3.0, "do_sample": True, "no_repeat_ngram_size": 2, "eos_token_id": 0}
    (tmp_path / "copy/generation_config.json").write_text(json.dumps(settings))
    other = load_model(tmp_path / "copy", torch.device("cpu"), torch.float32)
    prompts, how = [[5, 6, 7], [8]], Generation(max_tokens=6)
    assert dict(other.generate(prompts, how)) == dict(model.generate(prompts, how))


def test_weights_that_are_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    config |= {"n_layer": 3, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="would be random"):
        load_model(tmp_path / "copy", torch.device("cpu"), torch.float32)
    (tmp_path / "copy/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="transformers can't load"):
        load_model(tmp_path / "copy", torch.device("cpu"), torch.float32)


def test_a_model_that_sees_what_follows(tmp_path):
    tokenizer = small.model().tokenizer
    tokenizer.save(tmp_path / "tokenizer.json")
    config = transformers.BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=64)  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sees those after it"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)
    small.model().tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="transformers can't load"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UserError, match="transformers can't load"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)
