"""``rope``: the public function."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks
from . import reference


@backends.op()
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys (Su et al. 2021, arXiv:2104.09864).

    Turns each pair of features by its position's angle. Where the tables have fewer than ``head_dim / 2``
    columns, the features after the first ``2 · columns`` pass unturned.

    Args:
        q: ``[..., seq, heads, head_dim]``, float32, float16 or bfloat16.
        k: ``[..., seq, kv_heads, head_dim]``, in the dtype of q.
        cos, sin: ``[max_seq, rotary_dim / 2]``, in the dtype of q or float32.
        interleaved: pairs are neighbours (GPT-J), not the two halves (GPT-NeoX, Llama).
        positions: ``[..., seq]`` int64 or int32, each token's row in the tables; None counts from 0.
        backend: see ``explain``.

    Returns:
        ``(q, k)`` turned: new tensors of the same shapes and dtype.

    Raises:
        TypeError: a dtype or type that it does not take. ValueError: a wrong shape or device.
    """
    checks.floating("rope", "q", q, min_dim=3)
    checks.tensor("rope", "k", k)
    if k.dim() != q.dim():
        raise ValueError(f"rope: k must be laid out like q {list(q.shape)}, it has shape {list(k.shape)}")
    checks.like("rope", "k", k, "q", q, shape=(*q.shape[:-2], k.shape[-2], q.shape[-1]))
    checks.tensor("rope", "cos", cos)
    if cos.dim() != 2 or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"rope: cos must be [max_seq, up to {q.shape[-1] // 2}] for a head_dim of {q.shape[-1]}, "
            f"it has shape {list(cos.shape)}"
        )
    checks.parameter("rope", "cos", cos, "q", q, tuple(cos.shape))
    checks.parameter("rope", "sin", sin, "q", q, tuple(cos.shape))
    if positions is not None:
        checks.indices("rope", "positions", positions, "q", q)
        checks.sized("rope", "positions", positions, tuple(q.shape[:-2]))
    elif cos.shape[0] < q.shape[-3]:
        raise ValueError(f"rope: cos and sin hold {cos.shape[0]} positions, q has {q.shape[-3]}")
    backends.select("rope", q, backend)
    return reference.rope(q, k, cos, sin, interleaved=interleaved, positions=positions)
