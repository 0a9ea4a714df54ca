"""``pack_weight`` and ``packed_linear``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm.kernels import PackedWeight, explain, native, pack_weight, packed_linear
from fastllm.kernels.linear.packed import dequantized
from tests.numerics import DTYPES, assert_accurate

QUANTIZE = [None, "int8"]
# rows, in_features, out_features
SHAPES = [(1, 1, 1), (3, 17, 33), (5, 64, 32), (33, 577, 70), (70, 200, 31), (17, 33, 577), (13, 1030, 96)]


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def threads():
    """Sets their number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """In float64, and quantised weights as they are, not rounded to the dtype."""
    wide = weight.matrix().double()
    if weight.scales is not None:
        wide *= weight.scales.double()[:, None]
    out = F.linear(x.double(), wide, None if bias is None else bias.double())
    if not weight.gated:
        return out
    gate, out = out.chunk(2, -1)
    return F.silu(gate) * out


def inputs(rows: int, cols: int, features: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    x, weight, bias = (torch.randn(s, device=device) for s in ((rows, cols), (features, cols), (features,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def check(shape, dtype, backend, quantize=None, biased=True, device="cpu") -> None:
    x, weight, bias = inputs(*shape, dtype, device)
    packed = pack_weight(weight, quantize=quantize)
    bias = bias if biased else None
    eager = packed_linear(x, packed, bias, backend="torch")
    got = packed_linear(x, packed, bias, backend=backend)
    assert got.is_contiguous()
    terms = F.linear(x.double().abs(), weight.double().abs())
    assert_accurate(got, eager, exact(x, packed, bias), terms=terms)


def check_gated(shape, dtype, backend, quantize=None, device="cpu") -> None:
    rows, cols, features = shape
    x, gate, _ = inputs(*shape, dtype, device)
    weight = torch.randn(features, cols, device=device).to(dtype)
    packed = pack_weight(weight, gate=gate, quantize=quantize)
    eager = packed_linear(x, packed, backend="torch")
    got = packed_linear(x, packed, backend=backend)
    assert got.shape == (rows, features) and got.is_contiguous()
    # silu grows at most 1.1 times as its argument, so an error in a product is as large in the result as the other
    products = [F.linear(x.double(), w.double()).abs() for w in (gate, weight)]
    sums = [F.linear(x.double().abs(), w.double().abs()) for w in (gate, weight)]
    assert_accurate(got, eager, exact(x, packed, None), terms=1.1 * sums[0] * products[1] + products[0] * sums[1])


# ---- packing ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 577), (32, 64), (70, 31), (0, 5), (5, 0)], ids=str)
def test_unpack_gives_the_weight_back(dtype, shape):
    weight = torch.randn(shape).to(dtype)
    packed = pack_weight(weight)
    assert torch.equal(packed.unpack(), weight) and packed.unpack().is_contiguous()
    assert (packed.out_features, packed.in_features, packed.dtype, packed.device) == (*shape, dtype, weight.device)
    assert packed.scales is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (33, 577), (70, 31), (0, 5), (5, 0)], ids=str)
def test_unpack_gives_the_gate_and_the_weight_back(dtype, shape):
    gate, weight = (torch.randn(shape).to(dtype) for _ in range(2))
    packed = pack_weight(weight, gate=gate)
    assert torch.equal(packed.unpack(), torch.cat([gate, weight])) and packed.unpack().is_contiguous()
    assert (packed.out_features, packed.in_features, packed.gated) == (*shape, True)


def test_packing_copies():
    weight = torch.randn(4, 4)
    packed = pack_weight(weight)
    before = packed.unpack()
    weight.zero_()
    packed.unpack().zero_()
    assert torch.equal(packed.unpack(), before)


def test_pack_any_strides():
    weight = torch.randn(40, 66)
    for strided in (weight.t(), weight[::2, 1::3], weight[0].expand(5, 66)):
        assert torch.equal(pack_weight(strided).unpack(), strided)
        assert torch.equal(
            pack_weight(strided, quantize="int8").data, pack_weight(strided.clone(), quantize="int8").data
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_half_a_step_away(dtype):
    weight = (torch.randn(70, 577) * torch.logspace(-3, 3, 70)[:, None]).to(dtype)
    weight[3] = 0
    packed = pack_weight(weight, quantize="int8")
    steps = weight.double().abs().amax(1, keepdim=True) / 127
    rows = packed.matrix().double() * packed.scales.double()[:, None]
    assert bool(((rows - weight.double()).abs() <= steps / 2 * (1 + 1e-5)).all())
    assert torch.equal(packed.unpack(), dequantized(packed.matrix(), packed.scales, dtype))
    assert packed.data.dtype == torch.int8 and packed.unpack().dtype == dtype and not packed.unpack()[3].any()


def test_a_parameter_is_packed_without_its_gradient():
    packed = pack_weight(torch.nn.Linear(4, 3).weight)
    assert not packed.data.requires_grad and not packed.unpack().requires_grad


# ---- products ----


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(backend, shape, dtype, quantize):
    check(shape, dtype, backend, quantize)
    check(shape, dtype, backend, quantize, biased=False)
    check_gated(shape, dtype, backend, quantize)


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_instruction_sets(instruction_set, dtype, quantize):
    for shape in [*SHAPES, (600, 100, 40), (130, 4200, 33)]:
        check(shape, dtype, "cpu", quantize)
        check_gated(shape, dtype, "cpu", quantize)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 300),
    features=st.integers(0, 100),
    dtype=st.sampled_from(DTYPES),
    quantize=st.sampled_from(QUANTIZE),
)
def test_any_shape(backend, rows, cols, features, dtype, quantize):
    check((rows, cols, features), dtype, backend, quantize)
    check_gated((rows, cols, features), dtype, backend, quantize)


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_of_x(backend, dtype, quantize):
    _, weight, bias = inputs(1, 40, 33, dtype)
    packed = pack_weight(weight, quantize=quantize)
    fused = torch.randn(3, 5, 2, 120).to(dtype)
    for x in (
        fused[..., 40:80],
        fused[:, :, 0, :40],
        fused[0, 0, 0, :40],
        fused[0, :, 1, ::3],
        fused[..., 0, :40].transpose(0, 1),
        fused[:1, :1, :1, :40].expand(2, 3, 4, 40),
        fused[0, :0, :, :40],
    ):
        got = packed_linear(x, packed, bias, backend=backend)
        assert torch.equal(got, packed_linear(x.contiguous(), packed, bias, backend=backend))
        assert got.shape == (*x.shape[:-1], 33) and got.is_contiguous()


def company(rows: int, sizes, shape, backend: str, dtype: torch.dtype, quantize: str | None) -> list[Tensor]:
    """The results of the same rows: together, in groups in which they stand elsewhere, and beside NaN."""
    x, weight, bias = inputs(rows, *shape, dtype)
    packed, gated = (pack_weight(weight, gate=gate, quantize=quantize) for gate in (None, -weight.flip(0)))

    def call(x: Tensor) -> Tensor:
        both = packed_linear(x, packed, bias, backend=backend), packed_linear(x, gated, backend=backend)
        return torch.cat(both, -1)

    results = [call(x)]
    results += [torch.cat([call(group) for group in x.split(size)]) for size in sizes]
    others = torch.full((3, shape[0]), torch.nan, dtype=dtype)
    return [*results, call(torch.cat([others, x, others]))[3:-3]]


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company(instruction_set, threads, dtype, quantize):
    for shape in ((576, 70), (577, 33), (1300, 40)):
        expected = None
        for count, sizes in (1, (1, 2, 3, 5, 7, 11, 12, 13, 16, 17, 31, 32, 33)), (2, (1, 31, 32, 33)), (3, (33,)):
            threads(count)
            torch.manual_seed(0)
            first, *others = company(70, sizes, shape, "cpu", dtype, quantize)
            expected = first if expected is None else expected
            assert all(torch.equal(other, expected) for other in (first, *others))


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company_in_triton(dtype, quantize):
    first, *others = company(67, (5, 16, 64), (130, 70), "triton", dtype, quantize)
    for other in others:
        assert torch.equal(other, first)


def test_many_rows_and_one(threads):
    """More rows than a cache holds."""
    x, weight, bias = inputs(1100, 600, 100, torch.bfloat16)
    for quantize in QUANTIZE:
        packed = pack_weight(weight, quantize=quantize)
        for count in (1, 2):
            threads(count)
            together = packed_linear(x, packed, bias, backend="cpu")
            for i in (0, 511, 512, 863, 864, 1099):
                assert torch.equal(packed_linear(x[i], packed, bias, backend="cpu"), together[i])


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(instruction_set, dtype, quantize):
    x, weight, bias = inputs(40, 65, 33, dtype)
    packed = pack_weight(weight, quantize=quantize)
    expected = packed_linear(x, packed, bias, backend="cpu")
    x[3, 64], x[20, 0] = torch.nan, torch.inf
    got = packed_linear(x, packed, bias, backend="cpu")
    assert bool(got[3].isnan().all()) and not bool(got[20].isfinite().any())
    rest = [i for i in range(40) if i not in (3, 20)]
    assert torch.equal(got[rest], expected[rest])


def test_nothing(backend):
    for rows, cols, features in ((0, 8, 8), (3, 0, 8), (3, 8, 0)):
        x, weight, bias = inputs(rows, cols, features, torch.float32)
        got = packed_linear(x, pack_weight(weight), bias, backend=backend)
        assert torch.equal(got, F.linear(x, weight, bias))
        gated = packed_linear(x, pack_weight(weight, gate=weight), backend=backend)
        assert torch.equal(gated, torch.zeros(rows, features))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_float32(dtype, quantize, backend):
    """The sums as they are: rounded to the dtype of x they are the result in it."""
    x, weight, bias = inputs(5, 70, 33, dtype)
    packed = pack_weight(weight, quantize=quantize)
    eager = packed_linear(x, packed, bias, out_dtype=torch.float32, backend="torch")
    got = packed_linear(x, packed, bias, out_dtype=torch.float32, backend=backend)
    assert got.dtype == eager.dtype == torch.float32
    assert_accurate(got, eager, exact(x, packed, bias), terms=F.linear(x.double().abs(), weight.double().abs()))
    assert torch.equal(got.to(dtype), packed_linear(x, packed, bias, backend=backend))
    gated = pack_weight(weight, gate=weight, quantize=quantize)
    got = packed_linear(x, gated, out_dtype=torch.float32, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got.to(dtype), packed_linear(x, gated, backend=backend))
    with pytest.raises(TypeError, match="out_dtype must be"):
        packed_linear(x, packed, bias, out_dtype=torch.float64)


def test_opcheck(backend):
    x, weight, bias = inputs(3, 8, 5, torch.float32)
    packed = pack_weight(weight)
    data = packed.data if backend == "cpu" else weight
    args = (x, data, None, 5, backend == "cpu", False, bias, False, backend)
    torch.library.opcheck(torch.ops.fastllm.packed_linear_forward, args)


def test_compile(backend):
    torch._dynamo.reset()
    x, weight, bias = inputs(3, 64, 40, torch.float32)
    packed = pack_weight(weight, quantize="int8")

    def layer(x):
        return packed_linear(x * 2, packed, bias, backend=backend).relu()

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


# ---- the choice, and bad input ----


def test_explain():
    x, weight, _ = inputs(3, 8, 5, torch.float32)
    packed = pack_weight(weight)
    assert explain(packed_linear, x, packed).chosen == "cpu"
    elsewhere = PackedWeight(weight, None, 5, 8, torch.float32, False)
    found = explain(packed_linear, x, elsewhere)
    assert found.chosen == "torch" and "packed where there was no CPU kernel" in found.reasons["cpu"]
    assert torch.equal(packed_linear(x, elsewhere), F.linear(x, weight))
    with pytest.raises(ValueError, match="packed where there was no CPU kernel"):
        packed_linear(x, elsewhere, backend="cpu")


def test_bad_weights():
    for wrong, error, message in [
        ([[1.0]], TypeError, "weight must be a torch.Tensor, not list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "weight must be float32, float16 or bfloat16, not int64"),
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "weight must be float32, float16 or bfloat16, not float64"),
        (torch.ones(2), ValueError, "weight must have at least 2"),
        (torch.ones(2, 2, 2), ValueError, r"weight must be \[out_features, in_features\], it has shape \[2, 2, 2\]"),
    ]:
        with pytest.raises(error, match=message):
            pack_weight(wrong)
    for gate, error, message in [
        (torch.ones(2, 3), ValueError, r"gate must have shape \[2, 2\], it has \[2, 3\]"),
        (torch.ones(2, 2).half(), TypeError, "gate is float16 but weight is float32"),
        ([[1.0]], TypeError, "gate must be a torch.Tensor, not list"),
    ]:
        with pytest.raises(error, match=message):
            pack_weight(torch.ones(2, 2), gate=gate)
    with pytest.raises(ValueError, match="quantize must be None or 'int8', not 'int4'"):
        pack_weight(torch.ones(2, 2), quantize="int4")
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="infinity or NaN"):
            pack_weight(torch.tensor([[1.0, wrong]]), quantize="int8")


def test_bad_arguments():
    x, weight, bias = inputs(3, 8, 5, torch.float32)
    packed = pack_weight(weight)
    for args, error, message in [
        ((x.double(), packed), TypeError, "x is float64 but the weight was float32 when it was packed"),
        ((x.half(), packed), TypeError, "x is float16 but the weight was float32 when it was packed"),
        ((x, weight), TypeError, "weight must be what pack_weight makes, not Tensor"),
        ((x[:, :7], packed), ValueError, r"x must have in_features = 8 columns, it has shape \[3, 7\]"),
        ((x[0, 0], packed), ValueError, "x must have at least 1 dim"),
        ((x, packed, bias[:4]), ValueError, r"bias must have shape \[5\], it has \[4\]"),
        ((x, packed, bias.half()), TypeError, "bias is float16 but x is float32"),
        ((x, pack_weight(weight, gate=weight), bias), ValueError, "a gated weight takes no bias"),
        ((x.to("meta"), packed), ValueError, "weight is on cpu but x is on meta"),
        ((x.clone().requires_grad_(), packed), ValueError, "it has no gradient"),
        ((x, packed, bias.clone().requires_grad_()), ValueError, "it has no gradient"),
    ]:
        with pytest.raises(error, match=message):
            packed_linear(*args)
    with torch.no_grad():
        packed_linear(x.clone().requires_grad_(), packed)


def test_the_kernel_refuses_a_weight_packed_for_another_product():
    cpu = native.KERNELS["cpu"]
    x, weight, _ = inputs(3, 64, 40, torch.float32)
    out = torch.empty(3, 40)
    for data in (pack_weight(weight[:32]).data, pack_weight(weight[:, :63]).data, weight):
        with pytest.raises(ValueError, match="not packed for this product"):
            cpu.linear(x, data, None, None, False, out, 0, 0)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_gpus(dtype, quantize):
    for shape in [*SHAPES, (1, 4096, 4096), (300, 1024, 4096)]:
        check(shape, dtype, "triton", quantize, device="cuda")
        check_gated(shape, dtype, "triton", quantize, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_company_on_gpus(dtype, quantize):
    with torch.device("cuda"):
        x, weight, bias = inputs(300, 4096, 1000, dtype, "cuda")
        packed = pack_weight(weight, quantize=quantize)
        together = packed_linear(x, packed, bias)
        for size in (1, 2, 63, 64, 65, 128):
            assert torch.equal(torch.cat([packed_linear(g, packed, bias) for g in x.split(size)]), together)
