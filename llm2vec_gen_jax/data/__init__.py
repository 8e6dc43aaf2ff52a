"""Texts and records to token ids, and to padded numpy batches in a deterministic order."""
