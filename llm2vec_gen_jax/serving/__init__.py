"""Embeddings for others: resumable encoding of corpora, and an HTTP server with the APIs of OpenAI and TEI."""
