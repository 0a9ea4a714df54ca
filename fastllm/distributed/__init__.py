"""One model on many ranks: device mesh, FSDP2, tensor parallelism, gradients."""
