"""Texts to embeddings, and prompts or soft prompts to text."""
