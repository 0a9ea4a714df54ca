"""An account of linear_cross_entropy on an H100, without one: chunks against time and memory, and what else there is.

python -m benchmarks.heads prints the tables of kernels/loss/README.md.

A matrix product takes as long as its operations at RATE, or its bytes at BANDWIDTH where those are more; a kernel on
logits takes its bytes. What fits into CACHED bytes does not leave L2 between a product that writes it and the next that
reads it. Bytes are those of bfloat16, in float32 those of the weight's summed gradient where it is added up so.
"""

from __future__ import annotations

from typing import NamedTuple

# An H100 SXM. RATE is what cuBLAS reaches in large products: it makes the account of FORWARD, which Liger kernel was
# measured to do at 720 TFLOP/s (4096 features, 131,072 classes), come out right; forward and backward 666 to 701.
RATE, BANDWIDTH, CACHED = 760e12, 3.0e12, 30e6
FUSED = 0.8  # of RATE: a product in Triton with more to do than to store its result
EAGER = 22  # bytes a logit: written, read twice for log_softmax, written; its gradient twice, read three times, written
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192)


class Head(NamedTuple):
    tokens: int
    features: int
    classes: int

    @property
    def product(self) -> float:
        """Operations of one of the three products."""
        return 2.0 * self.tokens * self.features * self.classes


HEADS = (Head(16384, 4096, 128256), Head(16384, 4096, 32000), Head(16384, 768, 50304))


def bound(operations: float, moved: float, rate: float = RATE) -> float:
    return max(operations / rate, moved / BANDWIDTH)


def chunked(head: Head, chunk: int, sums: str = "bfloat16", backward: bool = True, one_pass: bool = False) -> float:
    """Seconds by chunks of tokens, as linear_chunks.py does it.

    ``sums``: the dtype in which the weight's gradient is added up, by the product itself or ("apart") after it.
    ``one_pass``: with a kernel that reads logits once for loss and gradient.
    """
    tokens, features, classes = head
    chunks, product = tokens / chunk, head.product * chunk / tokens
    weight, rows, logits = (2.0 * n for n in (classes * features, chunk * features, chunk * classes))
    outside = logits if logits > CACHED else 0.0  # what of logits passes through HBM, each time
    seconds = bound(product, weight + rows + outside)
    if not backward:
        return chunks * (seconds + outside / BANDWIDTH)
    seconds += (2 if one_pass else 3) * outside / BANDWIDTH
    seconds += bound(product, weight + rows + outside)
    total = (4.0 if "float32" in sums else 2.0) * classes * features
    if "apart" in sums:
        seconds += bound(product, outside + rows + weight) + (weight + 2 * total) / BANDWIDTH
        return chunks * seconds
    first, later = (bound(product, outside + rows + n * total) for n in (1, 2))
    return chunks * seconds + first + (chunks - 1) * later


def eager(head: Head) -> float:
    """Seconds of PyTorch's linear layer and loss, forward and backward, with all logits in bfloat16."""
    return 3 * bound(head.product, 0.0) + EAGER * head.tokens * head.classes / BANDWIDTH


def fused(head: Head, backward: bool = True) -> float:
    """Seconds of kernels that hold logits in tiles; the backward has to compute them again."""
    return (4 if backward else 1) * head.product / (FUSED * RATE)


def tflops(head: Head, seconds: float, products: int = 3) -> str:
    return f"{products * head.product / seconds / 1e12:.0f}"


def main() -> None:
    def show(*cells: object) -> None:
        print("|", " | ".join(map(str, cells)), "|")

    def name(head: Head) -> str:
        return "×".join(map(str, head))

    sums = "bfloat16", "float32", "float32, added apart"
    show("tokens×features×classes", "chunk", "logits, MB", *(f"sums in {s}" for s in sums), "one pass over logits")
    show("---", *["---:"] * 6)
    for head in HEADS:
        for chunk in CHUNKS:
            times = *(chunked(head, chunk, s) for s in sums), chunked(head, chunk, one_pass=True)
            show(name(head), chunk, f"{2e-6 * chunk * head.classes:,.0f}", *(tflops(head, t) for t in times))
    print()
    show("tokens×features×classes", "unfused, eager", "chunks of 2048", "fused", "chunks, forward", "fused, forward")
    show("---", *["---:"] * 5)
    for head in HEADS:
        both = eager(head), chunked(head, 2048), fused(head)
        forward = chunked(head, 2048, backward=False), fused(head, backward=False)
        show(name(head), *(tflops(head, t) for t in both), *(tflops(head, t, 1) for t in forward))


if __name__ == "__main__":
    main()
