"""The server: OpenAI's API on the engine, and a chat page (``fastllm serve``)."""
