from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastllm.data.tokenizer import Tokenizer
from fastllm.errors import ParameterError, UserError
from fastllm.inference import Engine, Prompt, SamplingParams
from fastllm.model.gpt import GPT

from .conftest import TEXT, random_gpt

CPU_KERNELS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(TEXT[:k]) for k in (3, 30, 31, 100, 150, 20, 60)]


@pytest.fixture(scope="module")
def engine(gpt, tokenizer) -> Engine:
    return Engine(gpt, tokenizer, max_batch=4, chunk=7)


@torch.no_grad()
def recomputed(model: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without any cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def log_probs(model: GPT, prompt: list[int], tokens: list[int]) -> Tensor:
    """Of ``tokens`` after ``prompt``, by the forward pass of training, float64."""
    logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def same(a, b) -> bool:
    return a.tokens == b.tokens and a.logprobs == b.logprobs and a.text == b.text


@pytest.mark.parametrize(
    "shape",
    [{}, {"window": 9}, {"qk_norm": True, "attention_dim": 128}, {"qkv_bias": True, "tie_embeddings": False}],
    ids=["llama", "mistral", "qwen3", "qwen2"],
)
def test_greedy_tokens_are_those_of_full_recomputation(shape, tokenizer, prompts):
    model = random_gpt(tokenizer.vocab_size, **shape)
    engine = Engine(model, tokenizer, max_batch=4, chunk=7)
    for prompt, found in zip(
        prompts, engine.generate(prompts, temperature=0, max_tokens=12, ignore_eos=True), strict=True
    ):
        assert found.tokens == recomputed(model, prompt, 12)
        assert found.finish_reason == "length"


@pytest.mark.parametrize("dtype", CPU_KERNELS, ids=str)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_request_does_not_depend_on_its_company(dtype, quantize, gpt, tokenizer, prompts):
    """Bit by bit: alone, in other batches and chunks, with another page size, and with half of the prompt known."""
    model = copy.deepcopy(gpt).to(dtype)
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.95, seed=3, ignore_eos=True)

    def answers(**options):
        return Engine(model, tokenizer, quantize=quantize, **options).generate(prompts, params)

    expected = answers(max_batch=1)
    for options in ({"max_batch": 7}, {"max_batch": 3, "chunk": 5}, {"page_size": 32, "chunk": 1}):
        assert all(map(same, expected, answers(**options)))
    engine = Engine(model, tokenizer, quantize=quantize)
    engine.generate([prompt[: len(prompt) // 2 + 1] for prompt in prompts], params)
    again = engine.generate(prompts, params)
    assert engine.stats.cached_tokens > 0
    assert all(map(same, expected, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_are_those_of_the_training_forward(dtype, gpt, tokenizer, prompts):
    """Within what the dtype leaves of them: the distance of the training forward from float64 is the measure."""
    model, exact = copy.deepcopy(gpt).to(dtype), copy.deepcopy(gpt).to(dtype).double()
    found = Engine(model, tokenizer).generate(prompts, max_tokens=20, seed=1, ignore_eos=True)
    ours, theirs = [], []
    for prompt, answer in zip(prompts, found, strict=True):
        reference = log_probs(exact, prompt, answer.tokens)
        ours.append(torch.tensor(answer.logprobs, dtype=torch.float64) - reference)
        theirs.append(log_probs(model, prompt, answer.tokens) - reference)
    own, other = (torch.cat(errors).square().mean().sqrt() for errors in (ours, theirs))
    assert own <= 2 * other + torch.finfo(torch.float32).eps


def test_a_seed_gives_the_same_answers(engine, prompts):
    first, again, other = (engine.generate(prompts, seed=seed, max_tokens=20) for seed in (1, 1, 2))
    assert all(map(same, first, again))
    assert not all(map(same, first, other))
    unseeded = [engine.generate([prompts[0]], max_tokens=20, ignore_eos=True)[0].tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_several_answers_to_a_prompt(engine, prompts):
    found = engine.generate(prompts[:2], n=3, seed=5, max_tokens=20, ignore_eos=True)
    assert len(found) == 6
    assert len({tuple(answer.tokens) for answer in found}) == 6
    assert same(found[1], engine.generate(prompts[:1], seed=6, max_tokens=20, ignore_eos=True)[0])
    assert found[4].cached_tokens == len(prompts[1][:-1]) // 16 * 16


def test_prompts_that_begin_alike_are_computed_once(gpt, tokenizer):
    engine = Engine(gpt, tokenizer, max_batch=8, chunk=16)
    prefix = tokenizer.encode(TEXT[:200])[:48]
    found = engine.generate([[*prefix, 50 + i] for i in range(8)], max_tokens=2)
    assert [answer.cached_tokens for answer in found] == [0] + 7 * [48]
    assert engine.stats.cached_tokens == 7 * 48
    assert engine.stats.free_pages == engine.stats.pages


def test_requests_wait_for_pages(gpt, tokenizer, prompts):
    """A pool for one long request: the others come after it, and none is ever short of memory."""
    engine = Engine(gpt, tokenizer, max_batch=4, kv_tokens=96)
    assert engine.max_seq_len == 96
    found = engine.generate(prompts, temperature=0, max_tokens=20, ignore_eos=True)
    expected = Engine(gpt, tokenizer).generate(prompts, temperature=0, max_tokens=20, ignore_eos=True)
    assert all(map(same, found, expected))
    assert engine.stats.free_pages == engine.stats.pages == 6


def test_a_cancelled_request_frees_its_pages_at_once(gpt, tokenizer, prompts):
    engine = Engine(gpt, tokenizer, max_batch=2)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    requests = [request for prompt in prompts[:4] for request in engine.add(Prompt(prompt), params)]
    engine.step()
    assert engine.stats.running == 2 and engine.stats.waiting == 2
    for request in (requests[0], requests[3]):
        engine.cancel(request)
        assert request.finish_reason == "cancelled"
    assert engine.stats.running == 1 and engine.stats.waiting == 1
    while engine.busy:
        engine.step()
    assert [len(request.tokens) for request in requests[1:3]] == [50, 50]
    assert engine.stats.free_pages == engine.stats.pages


def test_a_closed_stream_frees_its_pages(engine, prompts):
    stream = engine.stream(prompts[0], max_tokens=50, ignore_eos=True)
    next(stream)
    assert engine.stats.running == 1
    stream.close()
    assert engine.stats.running == 0 and engine.stats.free_pages == engine.stats.pages


def test_a_stream_is_the_answer_in_pieces(engine, prompts):
    params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True, logprobs=2)
    whole = engine.generate(prompts[:1], params)[0]
    deltas = list(engine.stream(prompts[0], params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.tokens] == whole.tokens
    assert [top for delta in deltas for top in delta.top_logprobs] == whole.top_logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_stop_texts_across_tokens(engine, prompts, tokenizer):
    whole = engine.generate(prompts[:1], seed=2, max_tokens=60, ignore_eos=True)[0]
    for start in range(0, len(whole.text) - 3, 5):
        stop = whole.text[start : start + 3]
        found = engine.generate(prompts[:1], seed=2, max_tokens=60, ignore_eos=True, stop=["\0never", stop])[0]
        assert found.finish_reason == "stop"
        assert found.text == whole.text[: whole.text.index(stop)]
        text = "".join(
            delta.text for delta in engine.stream(prompts[0], seed=2, max_tokens=60, ignore_eos=True, stop=stop)
        )
        assert text == found.text


def test_tokens_that_end_an_answer(engine, prompts, gpt):
    whole = engine.generate(prompts[:1], seed=2, max_tokens=30, ignore_eos=True)[0]
    end = whole.tokens[10]
    place = whole.tokens.index(end)
    found = engine.generate(prompts[:1], seed=2, max_tokens=30, ignore_eos=True, stop_token_ids=[end])[0]
    assert (found.finish_reason, found.tokens) == ("stop", whole.tokens[: place + 1])
    own = Tokenizer(engine.tokenizer.backend, (engine.tokenizer.eos_id, end))  # the model's own list
    found = Engine(gpt, own).generate(prompts[:1], seed=2, max_tokens=30)[0]
    assert (found.finish_reason, found.tokens) == ("stop", whole.tokens[: place + 1])
    assert whole.text.startswith(found.text)


def test_the_context_ends_an_answer(engine, prompts):
    found = engine.generate([prompts[3]], ignore_eos=True)[0]
    assert found.finish_reason == "length"
    assert found.prompt_tokens + len(found.tokens) == engine.max_seq_len == 128


@pytest.mark.parametrize("draft", ["prompt", "same", "other"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_speculation_changes_no_token(draft, temperature, gpt, tokenizer, prompts):
    """Nor a log-probability, nor where an answer ends."""
    drafts = {"prompt": "prompt", "same": gpt, "other": random_gpt(tokenizer.vocab_size, layers=1)}
    bias = dict.fromkeys((7, 8, 9), 12.0)  # answers repeat themselves, so that there is something to look up
    params = SamplingParams(
        max_tokens=25, temperature=temperature, top_p=0.9, seed=4, repetition_penalty=1.1, logit_bias=bias
    )
    expected = Engine(gpt, tokenizer).generate(prompts, params)
    engine = Engine(gpt, tokenizer, max_batch=3, chunk=9, speculate=4, draft=drafts[draft])
    assert all(map(same, expected, engine.generate(prompts, params)))
    stats = engine.stats
    assert stats.proposed_tokens > 0
    assert stats.accepted_tokens <= stats.proposed_tokens
    if draft == "same":  # it knows the penalties too: all that was proposed before an end is right
        assert stats.accepted_tokens > 0.8 * stats.proposed_tokens
    assert stats.free_pages == stats.pages


def test_logits_that_are_not_finite(gpt, tokenizer, prompts):
    model = copy.deepcopy(gpt)
    engine = Engine(model, tokenizer)
    for value in (float("nan"), float("inf"), 3e38):
        with torch.no_grad():
            model.model.norm.weight.fill_(value)
        for temperature in (0, 1.0):
            with pytest.raises(UserError, match="the model's logits are not finite"):
                Engine(model, tokenizer).generate(prompts, temperature=temperature)
    assert not engine.busy


def test_new_weights(gpt, tokenizer, prompts):
    """Prompts that are known are of the old weights, and forgotten."""
    other = random_gpt(tokenizer.vocab_size)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    engine = Engine(gpt, tokenizer)
    before = engine.generate(prompts, temperature=0, max_tokens=5)
    engine.update_weights(other)
    after = engine.generate(prompts, temperature=0, max_tokens=5)
    assert all(map(same, after, Engine(other, tokenizer).generate(prompts, temperature=0, max_tokens=5)))
    assert not all(map(same, before, after))
    with pytest.raises(UserError, match="another configuration"):
        engine.update_weights(random_gpt(tokenizer.vocab_size, layers=1))
    engine.add(Prompt(prompts[0]), SamplingParams())
    with pytest.raises(UserError, match="requests that run or wait"):
        engine.update_weights(gpt)


def test_wrong_calls(engine, prompts, tokenizer, gpt):
    with pytest.raises(ParameterError, match=r"the prompt has 128 tokens; the context is 128 tokens"):
        engine.generate([[5] * 128])
    with pytest.raises(UserError, match="pass a list"):
        engine.generate("def")
    with pytest.raises(UserError, match="there is no parameter 'top_q'; did you mean 'top_"):
        engine.generate(["def"], top_q=1)
    for ids in ([5, -1], [tokenizer.vocab_size]):
        with pytest.raises(UserError, match=rf"token -?\d+ is not one of its {tokenizer.vocab_size}"):
            engine.generate([ids])
    with pytest.raises(UserError, match="not valid UTF-8"):
        engine.generate(["a\udcff"])
    with pytest.raises(ParameterError, match="logit_bias has token"):
        engine.generate(["a"], logit_bias={10**6: 1.0})
    with pytest.raises(UserError, match="no chat template"):
        engine.chat([[{"role": "user", "content": "Hi"}]])
    with pytest.raises(UserError, match="max_batch must be at least 1"):
        Engine(gpt, tokenizer, max_batch=0)
    with pytest.raises(UserError, match="kv_tokens must be at least"):
        Engine(gpt, tokenizer, kv_tokens=3)
    with pytest.raises(UserError, match="the draft has"):
        Engine(gpt, tokenizer, speculate=2, draft=random_gpt(290))
    with pytest.raises(UserError, match="kv_tokens is 10,000,000,000,000, of"):
        Engine(gpt, tokenizer, kv_tokens=10**13)
    assert not engine.busy
    assert engine.generate([]) == []
    assert engine.generate([""], max_tokens=1)[0].prompt_tokens == 1


def test_absurd_lengths(tokenizer):
    """Memory is taken for what the machine has."""
    engine = Engine(random_gpt(tokenizer.vocab_size, max_seq_len=2**30, attention_dim=1024), tokenizer)
    assert engine.generate(["def "], max_tokens=10**30, stop_token_ids=list(range(tokenizer.vocab_size)))


def test_a_space_at_the_end_of_the_prompt(engine, tokenizer):
    """The first token is one that begins with the space, and shows without it."""
    prompt = engine.prompt("def ")
    assert prompt.tokens == tokenizer.encode("def") and prompt.skip == 1
    for seed in range(20):
        found = engine.generate(["def "], seed=seed, max_tokens=1, ignore_eos=True)[0]
        assert tokenizer.token_bytes(found.tokens[0]) == b" " + found.text.encode()
    chinese = Tokenizer.train(["你好世界天地人山水火" * 20], 300)
    plain = Engine(random_gpt(chinese.vocab_size), chinese)
    assert plain.prompt("你好 ") == Prompt(chinese.encode("你好 "))  # no token begins with a space
    for text in ("你好 ", " ", "", "  "):
        plain.generate([text], max_tokens=3)
