"""Buckets and clusters against the plain definition, their properties, and files that are damaged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.deduplication import (
    MinHash,
    MinHashSettings,
    Signatures,
    kept_documents,
    near,
    near_duplicates,
    read_clusters,
    write_buckets,
    write_clusters,
    write_signatures,
)
from fastllm.errors import UserError

SMALL = MinHashSettings(bands=4, rows=2, threshold=0.7)


def by_definition(rows: np.ndarray, chosen: MinHashSettings) -> list[int]:
    """The greedy choice over all pairs; documents of one signature share their fate."""
    result = [-1] * len(rows)
    for i, row in enumerate(rows):
        if (equals := np.flatnonzero((rows[:i] == row).all(1))).size and (row != 0xFFFFFFFF).any():
            leader = int(equals[0])
            result[i] = leader if result[leader] < 0 else result[leader]
            continue
        best = -1.0
        for j in range(i):
            equal = row == rows[j]
            candidate = equal.reshape(chosen.bands, chosen.rows).all(1).any() and (row != 0xFFFFFFFF).any()
            if result[j] < 0 and candidate and equal.mean() >= chosen.threshold - 1e-9 and equal.mean() > best:
                result[i], best = j, float(equal.mean())
    return result


def run(folder, rows, chosen=SMALL, parts=1):
    paths = []
    for number, part in enumerate(np.array_split(rows, parts)):
        paths.append(folder / f"signatures-{number}")
        write_signatures(paths[-1], chosen, [part])
    return near_duplicates(paths, folder)[0].tolist()


# Signatures of few different values: many agree in a band, in the whole, and in chains.
signatures = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), min_size=8, max_size=8),
        st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=8, max_size=8),
        st.just([0xFFFFFFFF] * 8),
    ),
    max_size=25,
).map(lambda rows: np.array(rows, np.uint32).reshape(-1, 8))
few = settings(max_examples=20, deadline=None)


@few
@given(signatures, st.integers(1, 4))
def test_the_definition(tmp_path_factory, rows, parts):
    assert run(tmp_path_factory.mktemp("near"), rows, parts=parts) == by_definition(rows, SMALL)


@few
@given(signatures)
def test_properties(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("near")
    repeated = run(folder, rows)
    kept = [i for i, other in enumerate(repeated) if other < 0]
    assert all(other < i and repeated[other] < 0 for i, other in enumerate(repeated) if other >= 0)
    assert run(folder, rows[kept]) == [-1] * len(kept)  # idempotent
    half = len(rows) // 2
    assert run(folder, rows[:half]) == repeated[:half]  # what comes later changes nothing before
    twice = run(folder, np.concatenate([rows, rows]))
    words = (rows != 0xFFFFFFFF).any(1)
    assert [i >= 0 for i in twice[len(rows) :]] == words.tolist()  # an equal text is always found


def test_chunks_and_the_order_of_bands_change_nothing(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2, (300, 8), np.uint32)
    rows[draw.random(300) < 0.1] = 0xFFFFFFFF
    expected = by_definition(rows, SMALL)
    assert len(set(expected)) > 3
    monkeypatch.setattr(near, "CHUNK", 7)
    monkeypatch.setattr(near, "NEIGHBORS", len(rows))  # a few buckets hold most of these documents
    assert run(tmp_path, rows, parts=5) == expected
    write_signatures(tmp_path / "all", SMALL, rows)
    opened = Signatures([tmp_path / "all"])
    paths = [tmp_path / f"band-{band}" for band in range(5)]
    for band in (3, 0, 4, 1, 2):
        write_buckets(opened, band, paths[band])
    for order in itertools.islice(itertools.permutations(paths), 0, None, 7):
        count = write_clusters(opened, order, tmp_path / "clusters")
        assert read_clusters(tmp_path / "clusters").tolist() == expected
        assert count == sum(other >= 0 for other in expected)


def test_a_chain_keeps_its_ends(tmp_path):
    rows = np.arange(8, dtype=np.uint32) + np.zeros((4, 1), np.uint32)
    rows[1, :2] += 100  # resembles 0 and 2
    rows[2, :4] += 100  # resembles 1 and 3
    rows[2, 2:4] += 100
    rows[3, :6] += 100
    rows[3, 2:4] += 100
    rows[3, 4:6] += 300
    assert run(tmp_path, rows) == [-1, 0, -1, 2]


@pytest.mark.parametrize("kind", ["equal", "boilerplate", "one bucket"])
def test_comparisons_grow_with_documents_only(tmp_path, monkeypatch, kind):
    """10,000 documents: equal; near copies of one; all in one bucket of some bands, and yet all different."""
    count, chosen = 10_000, MinHashSettings()
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2**32 - 1, (count, chosen.permutations), np.uint32)
    if kind == "equal":
        rows[:] = rows[0]
    elif kind == "boilerplate":
        same = draw.random(rows.shape) < 0.95
        rows = np.where(same, rows[0], rows)
    else:
        rows[:, :60] = rows[0, :60]
    compared = []
    best = near._Clusters._best
    monkeypatch.setattr(
        near._Clusters, "_best", lambda self, i, others: (compared.append(len(others)), best(self, i, others))[1]
    )
    repeated = run(tmp_path, rows, chosen)
    assert sum(compared) <= {"equal": 0, "boilerplate": 2 * count, "one bucket": near.NEIGHBORS * count}[kind]
    assert (
        sum(other >= 0 for other in repeated) == {"equal": count - 1, "boilerplate": count - 1, "one bucket": 0}[kind]
    )


def test_texts(tmp_path):
    minhash = MinHash()
    story = " ".join(f"word{i % 97} thing{i * i % 89}" for i in range(300))
    texts = ["", "...", story, story.upper() + "!", story.replace("word5 ", "other "), "short", "Short.", "other"]
    write_signatures(tmp_path / "a", minhash.settings, map(minhash.signature, texts))
    repeated, opened = near_duplicates([tmp_path / "a"])
    assert repeated.dtype == np.int64
    assert repeated.tolist() == [-1, -1, -1, 2, 2, -1, 5, -1]
    assert opened.similarity(2, 3) == 1 > opened.similarity(2, 4) >= 0.7
    assert list(kept_documents(texts[2:5], repeated, 2)) == [story]
    with pytest.raises(UserError, match="more documents than signatures"):
        list(kept_documents(texts, repeated, 3))


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-3] ^= 1
    elif how == "header":
        content[30] ^= 255
    elif how == "longer":
        content += b"\0"
    elif how == "foreign":
        content[:4] = b"PAR1"
    else:
        content = content[: int(how)]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "header", "longer", "foreign", "0", "10", "500", "1024", "-1", "-480"])
def test_damaged_files_are_named(tmp_path, how):
    rows = np.arange(1200, dtype=np.uint32).reshape(10, 120)
    write_signatures(tmp_path / "good", MinHashSettings(), [rows])
    write_signatures(tmp_path / "bad", MinHashSettings(), [rows])
    damage(tmp_path / "bad", how)
    with pytest.raises(UserError, match="bad"):
        near_duplicates([tmp_path / "good", tmp_path / "bad"])
    signatures = Signatures([tmp_path / "good", tmp_path / "good"])
    paths = [tmp_path / f"band{band}" for band in range(21)]
    for band, path in enumerate(paths):
        write_buckets(signatures, band, path)
    damage(paths[7], how)
    with pytest.raises(UserError, match="band7"):
        write_clusters(signatures, paths, tmp_path / "clusters")
    assert not (tmp_path / "clusters").exists()


def test_files_that_do_not_fit_are_named(tmp_path):
    rows = np.arange(80, dtype=np.uint32).reshape(10, 8)
    for name, chosen in {"a": SMALL, "b": SMALL, "c": MinHashSettings(bands=2, rows=4)}.items():
        write_signatures(tmp_path / name, chosen, [rows])
    with pytest.raises(UserError, match=r"c and .*a were made with different"):
        Signatures([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(UserError, match="no files"):
        Signatures([])
    with pytest.raises(UserError, match="missing"):
        Signatures([tmp_path / "missing"])
    one, two = Signatures([tmp_path / "a"]), Signatures([tmp_path / "a", tmp_path / "b"])
    paths = [tmp_path / f"band{band}" for band in range(5)]
    for band, path in enumerate(paths):
        write_buckets(one, band, path)
    with pytest.raises(UserError, match="other signatures"):
        write_clusters(two, paths, tmp_path / "clusters")
    with pytest.raises(UserError, match="no file of buckets for band 2"):
        write_clusters(one, paths[:2] + paths[3:], tmp_path / "clusters")
    with pytest.raises(UserError, match="same band"):
        write_clusters(one, [*paths, paths[1]], tmp_path / "clusters")
    with pytest.raises(UserError, match="not MinHash signatures"):
        Signatures([paths[0]])


def test_no_documents(tmp_path):
    write_signatures(tmp_path / "a", SMALL, [])
    assert near_duplicates([tmp_path / "a"])[0].tolist() == []
