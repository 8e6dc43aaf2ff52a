"""Texts and records: read, tokenized, and padded to numpy batches in a deterministic order."""
