"""What is read out of machine code, from lines of real kernels."""

from __future__ import annotations

import pytest

from benchmarks import machine_code
from benchmarks.aot import problems
from benchmarks.machine_code import blocks, read_amd, read_cubin, read_instructions, short_names

WIDE = """
        /*0190*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*01a0*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R17], desc[UR8][R14.64] ;
        /*0200*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0210*/                   STG.E desc[UR8][R6.64], R9 ;
        /*0220*/                   STG.E.128 desc[UR8][R2.64], R4 ;
"""
NARROW = """
        /*0080*/                   LDG.E.U16 R0, [R2.64] ;
        /*0090*/                   LDG.E.64 R4, [R2.64+0x10] ;
        /*00a0*/                   STG.E.U16 [R4.64], R0 ;
        /*00b0*/                   STG.E.U8 [R4.64+0x2], R0 ;
        /*00c0*/                   CALL.REL.NOINC 0x550 ;
        /*00d0*/                   CALL.ABS.NOINC R2 ;
"""
AMD = """
	global_load_dwordx4 v[2:5], v[0:1], off
	buffer_load_ushort v2, v3, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[4:5], v[8:9], a[0:15]
	s_swappc_b64 s[30:31], s[4:5]
	global_store_dwordx2 v[0:1], v[2:3], off
    .vgpr_count:     130
    .private_segment_fixed_size: 0
    .group_segment_fixed_size: 16384
"""


NOTHING = dict.fromkeys(("tensor_core", "tma", "load", "store", "stores", "calls"), 0)


@pytest.mark.parametrize(
    ("code", "row"),
    [
        (WIDE, {"tensor_core": 1, "tma": 0, "load": 16, "store": 16, "stores": 2, "calls": 0}),
        (NARROW, {"tensor_core": 0, "tma": 0, "load": 8, "store": 2, "stores": 2, "calls": 2}),
        ("UTMALDG.4D [UR8], [UR4] ; UTMASTG.4D [UR8], [UR4] ;", NOTHING | {"tma": 1, "stores": 1}),
        ("LDG.E.ENL2.256 R8, R4, desc[UR6][R2.64] ;", NOTHING | {"load": 32}),
    ],
)  # fmt: skip
def test_instructions(code, row):
    assert read_instructions(code) == row


def test_amd():
    assert read_amd(AMD, 256) == {
        "registers": 130, "local": 0, "shared": 16384,
        "tensor_core": 1, "tma": 0, "load": 16, "store": 8, "stores": 1, "calls": 1,
        "blocks": 3,  # 136 registers: three waves on each SIMD, of which a block takes one
    }  # fmt: skip


MANGLED = (
    "_ZN7fastllm4cuda9attention23attention_decode_kernelI13__nv_bfloat16Li64ENS1_11DecodeShapeILi4EEENS0_6SharedILm34816"
    "EEEEEvNS_15AttentionDecodeENS1_6ScoresEii"
)
OUTPUT = {
    "-res-usage": f" Function {MANGLED}:\n  REG:96 STACK:0 SHARED:1040 LOCAL:0 CONSTANT[0]:504 TEXTURE:0 SURFACE:0\n",
    "-sass": f"\t\tFunction : {MANGLED}\n{WIDE}",
    "-elf": f".nv.info.{MANGLED}\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0x80 0x1 0x1\n",
}


@pytest.mark.parametrize(
    ("target", "shared", "found", "blocks"),
    [
        ("sm_80", None, 1040 + 34816, 4),
        ("sm_90a", None, 16 + 34816, 5),  # ptxas counts what each block has reserved
        ("sm_120", None, 16 + 34816, 2),
        ("sm_90a", 1000, 1000, 5),  # by registers
    ],
)
def test_dynamic_shared_memory_is_in_a_kernels_name(target, shared, found, blocks, monkeypatch, tmp_path):
    """Unless whoever launches it says how much it gets."""
    monkeypatch.setattr(machine_code, "_cuobjdump", lambda what, *rest: OUTPUT[what])
    row = read_cubin(tmp_path, target, shared=shared)[MANGLED]
    assert row == {"registers": 96, "local": 0, "shared": found, "blocks": blocks} | read_instructions(WIDE)


def test_names_are_short_and_tell_kernels_apart():
    attention = "fastllm::cuda::attention::"
    shape = f"{attention}QueriesShape<8, 1, 64, 1>, fastllm::cuda::Shared<98304ul> >"
    dq, dkdv = f"{attention}attention_dq_kernel<__half, 96, ", f"{attention}attention_dkdv_kernel<__nv_bfloat16, 64, "
    split, whole = (f"{attention}KeysShape<8, 1, 48, {x}, 1>, fastllm::cuda::Shared<1ul> >" for x in ("true", "false"))
    softmax = "fastllm::cuda::(anonymous namespace)::softmax::softmax_forward_loop<__nv_bfloat16, 8, true>"
    assert short_names([dq + shape, dkdv + split, dkdv + whole, softmax]) == [
        "attention_dq_kernel<__half, 96>",
        "attention_dkdv_kernel<bfloat16, 64, KeysShape<8, 1, 48, true, 1>>",
        "attention_dkdv_kernel<bfloat16, 64, KeysShape<8, 1, 48, false, 1>>",
        "softmax_forward_loop<bfloat16, 8, true>",
    ]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "expected"),
    [
        ("sm_90a", 32, 0, 128, 16),  # by threads
        ("sm_90a", 33, 0, 128, 12),  # 40 registers a thread
        ("sm_90a", 255, 100_000, 128, 2),
        ("sm_90a", 168, 100_000, 128, 2),  # by shared memory
        ("sm_80", 64, 0, 1024, 1),
        ("sm_120", 32, 0, 1024, 1),
        ("sm_120", 16, 0, 32, 24),  # by blocks
        ("gfx942", 72, 0, 512, 3),
        ("gfx942", 24, 40_000, 256, 1),
    ],
)
def test_blocks_of_a_multiprocessor(target, registers, shared, threads, expected):
    assert blocks(target, registers, shared, threads) == expected


ROW = {"registers": 40, "local": 0, "shared": 0, "tensor_core": 4, "tma": 2, "load": 16, "store": 16, "stores": 2,
       "calls": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": 4}, "loads and stores 16 and 4 bytes at once, the table has 16 and 16"),
        ({"load": 8}, "loads and stores 8 and 16"),
        ({"calls": 1}, "1 calls"),
        ({"tensor_core": 0}, "lost its 4 tensor-core instructions"),
        ({"tma": 0}, "lost its 2 loads by TMA"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"shared": 300_000}, "300000 bytes of shared memory, there are 232448"),
        ({"registers": 48}, ""),
    ],
    ids=str,
)
def test_what_got_worse_is_a_problem_with_any_compiler(change, message):
    old = {"kernel": {"sm_90a": ROW}}
    new = {"kernel": {"sm_90a": ROW | change}}
    found = problems("triton", new, old, same_compiler=False)
    assert len(found) == bool(message) and all(message in line for line in found)
    assert problems("triton", new, old, same_compiler=True)
    assert not problems("triton", old, old, same_compiler=True)
