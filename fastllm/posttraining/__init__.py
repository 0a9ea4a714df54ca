"""Post-training: instruction tuning, preferences, and reinforcement learning."""
