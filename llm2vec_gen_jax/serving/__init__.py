"""Embeddings for others: resumable encoding of corpora, and an HTTP server with OpenAI's API."""
