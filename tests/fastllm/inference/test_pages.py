from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.inference.pages import PagePool


def test_shared_prompts():
    pool = PagePool(8, 4)
    prompt = list(range(11))
    keys = pool.keys(prompt)
    assert len(keys) == 2
    first, known = pool.acquire(14, keys)
    assert (len(first), known) == (4, 0)
    pool.remember(keys[0], first[0])
    second, known = pool.acquire(14, keys)
    assert known == 1 and second[0] == first[0] and not set(second[1:]) & set(first)
    pool.remember(keys[1], first[1])
    pool.remember(keys[1], second[1])  # the same content twice: the first is known
    assert pool.acquire(14, keys) is None  # one page is free
    pool.release(first)
    third, known = pool.acquire(14, keys)
    assert known == 2 and third[:2] == first[:2]
    pool.release(second)
    pool.release(third)
    assert pool.free == 8
    assert pool.keys(prompt)[:1] == pool.keys([*prompt[:4], 99])
    assert pool.keys(prompt)[1] != pool.keys([99, *prompt[1:]])[1]  # the same page after another


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=60))
def test_no_page_is_lost_or_held_twice(steps):
    """Requests with one of four prompts come and go; a page is held by requests with the same tokens alone."""
    pool, held, content = PagePool(12, 4), [], {}
    for kind, size, leave in steps:
        if leave and held:
            pool.release(held.pop(size % len(held))[0])
            continue
        prompt = [7] * (4 * (kind % 2)) + [kind] * size
        keys = pool.keys(prompt[:-1])
        found = pool.acquire(len(prompt) + 2, keys)
        if found is None:
            assert pool.free < pool.needed(len(prompt) + 2)
            continue
        pages, known = found
        assert len(set(pages)) == len(pages) == pool.needed(len(prompt) + 2)
        for i, page in enumerate(pages):
            if i < known:
                assert content[page] == prompt[: 4 * (i + 1)]
            else:
                assert all(page not in others for others, _ in held)
                content[page] = prompt[: 4 * (i + 1)]
        for key, page in zip(keys[known:], pages[known:], strict=False):
            pool.remember(key, page)
        held.append((pages, prompt))
    for pages, _ in held:
        pool.release(pages)
    assert pool.free == 12
