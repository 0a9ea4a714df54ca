"""From text files to token windows: sources, tokenizer, datasets."""
