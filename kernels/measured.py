"""What was measured to be the fastest on a kind of GPU: backends of ops, tiles of attention kernels.

Written by `python -m benchmarks --defaults` from benchmarks/results/.
"""

# (op, name of the GPU) -> backend
MEASURED_FASTER: dict[tuple[str, str], str] = {}

# (GPU, kernel, padded head dimension, window or softcap) -> (queries, keys, warps, stages, specialised)
MEASURED_TILES: dict[tuple[str, str, int, bool], tuple[int, int, int, int, bool]] = {}
