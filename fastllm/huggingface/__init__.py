"""Hugging Face models: read a folder, write one, and put the kernels into an instance."""
