"""The warp-specialised attention kernels: results in Triton's interpreter, and what Triton compiles of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks.targets import specialized_attention
from fastllm.kernels import flash_attention
from tests.conftest import IN_THE_INTERPRETER
from tests.kernels.attention_checks import OPTIONS, check, check_packed, check_same, qkv

pytest.importorskip("triton")

from fastllm.kernels.attention import operators, triton_backward, triton_forward, triton_specialized
from fastllm.kernels.attention import triton_tuning as tuning
from fastllm.kernels.attention.options import UNBOUNDED, Options

TILES = {"forward": (64, 32), "dkdv": (32, 64), "dq": (64, 32)}
KERNELS = {
    "forward": (triton_forward, "specialized_forward_kernel"),
    "dkdv": (triton_backward, "specialized_dkdv_kernel"),
    "dq": (triton_backward, "specialized_dq_kernel"),
}


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The specialised kernels are the defaults; the names of those that were launched."""
    found: list[str] = []
    default = tuning.default

    def choose(kernel: str, *rest) -> tuning.Config:
        return tuning.Config(*TILES[kernel], 4, 1, True) if kernel in TILES else default(kernel, *rest)

    monkeypatch.setattr(tuning, "default", choose)
    for name, (module, kernel) in KERNELS.items():
        original = getattr(module, kernel)

        def launch(*arguments, _name=name, _original=original, **options):
            found.append(_name)
            _original(*arguments, **options)

        monkeypatch.setattr(module, kernel, launch)
    return found


HALF, BFLOAT16 = torch.float16, torch.bfloat16


@IN_THE_INTERPRETER
@pytest.mark.parametrize(
    ("seq_q", "seq_k", "dim", "dtype", "options"),
    [
        (100, 100, 32, BFLOAT16, {}),
        (100, 75, 8, HALF, {"causal": False}),
        (36, 130, 40, BFLOAT16, {}),
        (132, 70, 16, HALF, {}),  # the first queries see nothing
        (128, 128, 72, BFLOAT16, {"window": 50}),
        (100, 170, 16, HALF, {"causal": False, "window": (20, 7)}),
        (64, 96, 128, BFLOAT16, {"softcap": 3.0}),
        (96, 96, 64, HALF, {"scale": -0.2}),
        (132, 90, 24, BFLOAT16, {"window": 9, "softcap": 5.0}),
        (4, 1, 16, BFLOAT16, {"causal": False}),
    ],
    ids=str,
)
def test_by_the_rule(launched, seq_q, seq_k, dim, dtype, options):
    check(qkv(seq_q, seq_k, 2, 1, dim, dtype, batch=1), "triton", **options)
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(launched, options):
    check(qkv(70, 150, 4, 2, 24, BFLOAT16, batch=1), "triton", **options)
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 20, "softcap": 3.0}], ids=str)
def test_sinks(launched, options):
    for size in ((40, 90), (90, 41)):
        check([*qkv(*size, 4, 2, 16, BFLOAT16, batch=2), torch.randn(4)], "triton", **options)
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
def test_several_heads_and_batches_and_another_dimension_of_v(launched):
    q, k, v = qkv(67, 68, 6, 2, 24, BFLOAT16, batch=3)
    ours, theirs = (partial(flash_attention, backend=backend) for backend in ("triton", "torch"))
    check_same(ours, theirs, q, k, torch.randn(3, 68, 2, 40).bfloat16())
    fused = torch.randn(2, 68, 8, 16).bfloat16()
    check(list(fused.split([4, 2, 2], 2)), "triton", window=30)
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 20, "softcap": 9.0}], ids=str)
def test_packed_sequences_as_if_alone(launched, options):
    lengths = [(70, 70), (0, 9), (3, 33), (35, 0), (1, 1), (91, 44), (0, 0)]  # 200 queries
    check_packed("triton", lengths, options, BFLOAT16)
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
def test_nan_stays_in_its_sequence(launched):
    """What stands behind a sequence in memory belongs to the next one."""
    tensors = [torch.randn(2, 40, 2, 16).bfloat16() for _ in range(4)]
    for t in tensors:
        t[1] = float("nan")
    q, k, v, dout = (t.flatten(0, 1) for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = flash_attention(*leaves, cu_seqlens_q=torch.tensor([0, 40, 80]), backend="triton")
    for result in (out, *torch.autograd.grad(out, leaves, dout)):
        assert torch.isfinite(result[:40]).all() and result[40:].isnan().any()
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
def test_max_seqlen_that_is_too_small_gives_nan(launched, monkeypatch):
    """As on a GPU, where nobody looks at the lengths."""
    monkeypatch.setattr(operators, "check_packing", lambda *_: None)
    leaves = [t[0].requires_grad_() for t in qkv(2300, 2300, 1, 1, 16, BFLOAT16, batch=1)]
    given = {"cu_seqlens_q": torch.tensor([0, 2300]), "max_seqlen_q": 64, "window": 9, "return_lse": True}
    out, lse = flash_attention(*leaves, backend="triton", **given)
    assert torch.isfinite(out[:64]).all() and out[64:].isnan().all() and lse[:, 64:].isnan().all()
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.isfinite(dq[:64]).all() and all(grad[64:].isnan().all() for grad in (dq, dk, dv))
    assert {*launched} == {*KERNELS}


@IN_THE_INTERPRETER
@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ("an odd dimension", set()),
        ("float32", set()),
        ("an odd stride", set()),
        ("an odd address", set()),
        ("one key for all", set()),
        ("one row of dout for all", {"forward"}),
    ],
)
def test_other_calls_have_the_plain_kernels(launched, what, taken):
    q, k, v = qkv(50, 50, 2, 2, 20 if "dimension" in what else 16, BFLOAT16, batch=1)
    if what == "float32":
        q, k, v = q.float(), k.float(), v.float()
    elif what == "an odd stride":
        q = torch.randn(1, 50, 2, 17).bfloat16()[..., :16]
    elif what == "an odd address":
        q = torch.randn(1 + q.numel()).bfloat16()[1:].view_as(q)
    elif what == "one key for all":
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = flash_attention(*leaves, backend="triton")
    dout = torch.randn_like(out)
    dout = dout[:, :1].expand_as(out) if "dout" in what else dout
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    out = flash_attention(*leaves, backend="torch")
    for a, b in zip(got, [out, *torch.autograd.grad(out, leaves, dout)], strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)  # the rule is checked above
    assert {*launched} == taken


@pytest.mark.parametrize("hidden", [0.0, -math.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_the_inline_code_hides_what_the_interpreter_hides(hidden, whole):
    """By PTX's meaning of its instructions: results, elements, firsts, seconds and wholes, PACK operands of each."""
    pack = triton_specialized.PACK.value
    code = triton_specialized.TO_ZERO_CODE if hidden == 0.0 else triton_specialized.TO_MINUS_INFINITY_CODE
    kinds = triton_specialized.OPERANDS.value.split(",")
    assert kinds == ["=f"] * pack + [str(i) for i in range(pack)] + ["r"] * (3 * pack)
    first, second = (torch.randint(-2, 3, (pack,)).tolist() for _ in range(2))
    operands: list[float] = [1.0 + i for i in range(pack)] * 2 + [*first, *second] + [int(whole)] * pack
    predicates: dict[str, bool] = {}

    def value(word: str) -> float:
        return (
            operands[int(word[1:])]
            if word[0] == "$"
            else float({"0fff800000": "-inf", "0f00000000": "0"}.get(word, word))
        )

    _, *lines, end = code.value.splitlines()
    assert end == "done${:uid}: }"
    for line in lines:
        operation, *words = line.rstrip(";").replace(",", "").split()
        if operation.startswith("@"):
            if predicates[operation[1:]]:
                assert words == ["bra.uni", "done${:uid}"]
                break
        elif operation == "setp.ne.s32":
            predicates[words[0]] = value(words[1]) != value(words[2])
        elif operation == "setp.le.s32":
            predicates[words[0]] = value(words[1]) <= value(words[2])
        else:
            assert operation == "selp.f32"
            operands[int(words[0][1:])] = value(words[1] if predicates[words[3]] else words[2])
    expected = [1.0 + i if whole or a <= b else hidden for i, (a, b) in enumerate(zip(first, second, strict=True))]
    assert operands[:pack] == expected


def test_where_they_are_tried():
    for kernel in KERNELS:
        for dim in (16, 64, 128):
            found = tuning.specialized(kernel, "sm_90", dim, False)
            assert found == tuning.specialized(kernel, "sm_90a", dim, False)
            assert all(c.specialized and c.warps == 4 and 128 in c[:2] for c in found) and found
            for target in ("cpu", "sm_80", "sm_100", "gfx942"):
                assert tuning.specialized(kernel, target, dim, False) == ()
    assert tuning.specialized("dkdv", "sm_90", 128, True) == tuning.specialized("decode", "sm_90", 128, False) == ()


def test_a_measured_one_runs_where_it_can(monkeypatch):
    """Where it can't, the table's."""
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "a GPU")
    best = tuning.specialized("forward", "sm_90", 128, False)[0]
    monkeypatch.setitem(tuning.MEASURED_TILES, ("a GPU", "forward", 128, False), tuple(best))
    q, options, found = torch.empty(1, 1, 1, 128, dtype=BFLOAT16), Options(1.0, UNBOUNDED, 0, 0.0), []
    for can in (True, False):
        tuning.launch("forward", q, q, options, (), found.append, (), lambda can=can: can)
    assert found == [best, tuning.default("forward", "sm_90", 128, 2, False)]


def test_a_search_tries_them(monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "")
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    given: dict[str, tuple] = {}

    def tuned(key, device, config, call, outputs, special):
        given[key] = special
        return config

    monkeypatch.setattr(tuning, "_tuned", tuned)
    q, options = torch.empty(1, 1, 1, 128, dtype=BFLOAT16), Options(1.0, UNBOUNDED, 0, 0.0)
    for can in (True, False):
        tuning.launch("dq", q, q, options, (), lambda config: None, (), lambda can=can: can)
    assert list(given.values()) == [tuning.specialized("dq", "sm_90", 128, False), ()]


def needs_sm_90() -> pytest.MarkDecorator:
    have = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return pytest.mark.skipif(not have, reason="warp specialisation is for GPUs of compute capability 9.0")


@pytest.mark.gpu
@needs_sm_90()
@pytest.mark.parametrize(
    ("dim", "dtype", "options"),
    [
        (64, BFLOAT16, {}),
        (80, HALF, {"window": 150}),
        (128, BFLOAT16, {}),
        (128, HALF, {"causal": False}),
        (128, BFLOAT16, {"window": 300, "softcap": 5.0}),
        (256, BFLOAT16, {}),
    ],
    ids=str,
)
def test_on_a_gpu(dim, dtype, options):
    with specialized_attention("softcap" in options):
        for lengths in ((300, 300), (200, 1000), (1000, 130)):
            check(qkv(*lengths, 4, 2, dim, dtype, batch=2, device="cuda"), "triton", **options)


@pytest.mark.gpu
@needs_sm_90()
@pytest.mark.parametrize("options", [{}, {"window": 150}], ids=str)
def test_packed_and_sinks_on_a_gpu(options):
    with specialized_attention():
        check_packed("triton", [(1, 1), (300, 300), (0, 3), (5, 400), (133, 70), (4, 0)], options, BFLOAT16, "cuda")
        inputs = [*qkv(200, 300, 4, 2, 64, BFLOAT16, device="cuda"), torch.randn(4, device="cuda")]
        check(inputs, "triton", **options)


@pytest.mark.gpu
@needs_sm_90()
def test_in_a_cuda_graph():
    """The memory for descriptors is the graph's own."""
    q, k, v = qkv(512, 512, 4, 2, 64, BFLOAT16, device="cuda")
    with specialized_attention():
        expected = flash_attention(q, k, v, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = flash_attention(q, k, v, backend="triton")
        out.zero_()
        graph.replay()
    assert torch.equal(out, expected)
