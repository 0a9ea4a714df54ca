"""What a run takes before it starts: presets, scaling laws, memory, time and cost."""
