"""Benchmarks of fastllm's kernels, and the tables they leave behind."""
