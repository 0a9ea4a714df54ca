"""Training: the trainer, its objectives and data, optimizers, checkpoints, spike detection, metrics."""
