"""What linear_jsd refuses: each error names the argument and says what it should be."""

from __future__ import annotations

import pytest
import torch

from fastllm.kernels import linear_jsd, use_backend

BAD = {
    "not a tensor": (lambda h, w, t, u: linear_jsd([1.0], w, t, u), TypeError, "hidden must be a torch.Tensor"),
    "integers": (lambda h, w, t, u: linear_jsd(h, w, t.int(), u), TypeError, "teacher_hidden must be float32"),
    "weight's shape": (lambda h, w, t, u: linear_jsd(h, w.t(), t, u), ValueError, "weight must have shape"),
    "weight's dims": (
        lambda h, w, t, u: linear_jsd(h, w, t, u[0]), ValueError,
        r"teacher_weight must be \[classes, teacher_features\]",
    ),
    "weight's dtype": (
        lambda h, w, t, u: linear_jsd(h, w, t, u.half()), TypeError,
        "teacher_weight is float16 but teacher_hidden is float32",
    ),
    "weight elsewhere": (lambda h, w, t, u: linear_jsd(h, w.to("meta"), t, u), ValueError, "weight is on meta"),
    "other classes": (
        lambda h, w, t, u: linear_jsd(h, w, t, u[:9]), ValueError, r"teacher_weight must have shape \[20, 5\]",
    ),
    "no classes": (lambda h, w, t, u: linear_jsd(h, w[:0], t, u[:0]), ValueError, "there are no classes"),
    "other tokens": (
        lambda h, w, t, u: linear_jsd(h, w, t[:2], u), ValueError, r"teacher_hidden must have shape \[4, 5\]",
    ),
    "other dtype": (
        lambda h, w, t, u: linear_jsd(h, w, t.bfloat16(), u.bfloat16()), TypeError,
        "teacher_hidden is bfloat16 but hidden is float32",
    ),
    "bias": (lambda h, w, t, u: linear_jsd(h, w, t, u, bias=w[0]), ValueError, "bias must have shape"),
    "teacher's bias": (
        lambda h, w, t, u: linear_jsd(h, w, t, u, teacher_bias=w[0]), ValueError, "teacher_bias must have shape",
    ),
    "mask's dtype": (lambda h, w, t, u: linear_jsd(h, w, t, u, mask=torch.ones(4)), TypeError, "mask must be boolean"),
    "mask's shape": (
        lambda h, w, t, u: linear_jsd(h, w, t, u, mask=torch.ones(3).bool()), ValueError, r"mask must have shape \[4\]",
    ),
    "mask": (lambda h, w, t, u: linear_jsd(h, w, t, u, mask=[True] * 4), TypeError, "mask must be a torch.Tensor"),
    "beta": (lambda h, w, t, u: linear_jsd(h, w, t, u, beta=1.5), ValueError, "beta must be between 0 and 1"),
    "no beta": (lambda h, w, t, u: linear_jsd(h, w, t, u, beta=float("nan")), ValueError, "beta must be between"),
    "learnt beta": (
        lambda h, w, t, u: linear_jsd(h, w, t, u, beta=torch.ones((), requires_grad=True)), TypeError,
        "beta gets no gradient",
    ),
    "temperature": (
        lambda h, w, t, u: linear_jsd(h, w, t, u, temperature=0), ValueError, "temperature must be positive",
    ),
    "reduction": (lambda h, w, t, u: linear_jsd(h, w, t, u, reduction="batchmean"), ValueError, "reduction must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("preferred", ["cpu", "triton", "cuda", "torch"])
def test_bad_input(simt, case, preferred):
    bad, error, message = BAD[case]
    with use_backend(preferred), pytest.raises(error, match=f"linear_jsd: {message}"):
        bad(torch.randn(4, 6), torch.randn(20, 6), torch.randn(4, 5), torch.randn(20, 5))
