"""Models from GGUF files, llama.cpp's format: one file with the configuration, the tokenizer and the weights."""
