"""Other people's file formats: Hugging Face folders, GGUF, PEFT adapters, the published checkpoints."""
