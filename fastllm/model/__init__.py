"""The GPT that is built from the kernels: modules, rotary tables, key/value cache, weights, FLOPs."""
