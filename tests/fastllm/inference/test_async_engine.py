from __future__ import annotations

import asyncio
import copy
import time

import pytest
import torch

from fastllm.errors import ParameterError, UserError
from fastllm.inference import Engine, Prompt, SamplingParams
from fastllm.inference.async_engine import AsyncEngine, EngineClosed

PARAMS = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
LONG = SamplingParams(max_tokens=120, seed=1, ignore_eos=True)


class Slow(Engine):
    """An answer of LONG takes more than a second on any machine."""

    def step(self):
        time.sleep(0.01)
        return super().step()


async def answer(engine: AsyncEngine, prompt: Prompt, params: SamplingParams = PARAMS) -> list[int]:
    return [token async for _, delta in engine.stream([prompt], params) for token in delta.tokens]


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


def test_many_at_once(gpt, tokenizer):
    prompts = [Prompt([5 + i, 7, 9]) for i in range(12)]
    expected = [c.tokens for c in Engine(gpt, tokenizer).generate(prompts, PARAMS)]

    async def main() -> None:
        engine = AsyncEngine(Engine(gpt, tokenizer, max_batch=4))
        assert await asyncio.gather(*(answer(engine, prompt) for prompt in prompts)) == expected
        assert engine.stats.generated_tokens == 12 * 30
        await engine.close()
        with pytest.raises(EngineClosed):
            await answer(engine, prompts[0])

    asyncio.run(main())


def test_who_goes_away_frees_the_pages(gpt, tokenizer):
    async def main() -> None:
        engine = AsyncEngine(Slow(gpt, tokenizer, max_batch=2))
        stream = engine.stream([Prompt([5, 6])], LONG)
        await anext(stream)
        await stream.aclose()
        await until(lambda: engine.stats.running == 0)
        tasks = [asyncio.create_task(answer(engine, Prompt([5, 6]), LONG)) for _ in range(4)]
        await until(lambda: engine.stats.waiting == 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: engine.stats.running == engine.stats.waiting == 0)
        assert engine.stats.free_pages == engine.stats.pages
        assert len(await answer(engine, Prompt([5, 6]))) == 30
        await engine.close()

    asyncio.run(main())


def test_errors_reach_who_asked_and_the_engine_lives_on(gpt, tokenizer):
    model = copy.deepcopy(gpt)

    async def main() -> None:
        inner = Engine(model, tokenizer)
        engine = AsyncEngine(inner)
        with pytest.raises(ParameterError, match="the prompt has 200 tokens"):
            await answer(engine, Prompt([5] * 200))
        norm, inner._model.paged.norm = inner._model.paged.norm, torch.full_like(inner._model.paged.norm, float("nan"))
        with pytest.raises(UserError, match="not finite"):
            await answer(engine, Prompt([5]))
        inner._model.paged.norm = norm[:3]  # a bug, or a want of memory
        results = await asyncio.gather(*(answer(engine, Prompt([5])) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, ValueError | RuntimeError) for error in results)
        inner._model.paged.norm = norm
        assert len(await answer(engine, Prompt([5]))) == 30
        assert engine.stats.free_pages == engine.stats.pages
        await engine.close()

    asyncio.run(main())


def test_close_waits_and_then_ends_what_runs(gpt, tokenizer):
    async def main() -> None:
        engine = AsyncEngine(Slow(gpt, tokenizer))
        task = asyncio.create_task(answer(engine, Prompt([5])))
        await until(lambda: engine.stats.running == 1)
        await engine.close(30)
        assert len(await task) == 30
        engine = AsyncEngine(Slow(gpt, tokenizer))
        task = asyncio.create_task(answer(engine, Prompt([5]), LONG))
        await until(lambda: engine.stats.running == 1)
        await engine.close(0)
        with pytest.raises(EngineClosed):
            await task

    asyncio.run(main())
