"""Checkpoint formats of others: Hugging Face, GGUF, PEFT and the published package."""
