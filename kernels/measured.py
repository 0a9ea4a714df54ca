"""Which backend was measured to be the fastest for an op on a kind of GPU.

Written by `python -m benchmarks --defaults` from benchmarks/results/.
"""

# (op, name of the GPU) -> backend
MEASURED_FASTER: dict[tuple[str, str], str] = {}
