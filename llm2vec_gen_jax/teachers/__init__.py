"""Alignment targets: teacher embeddings, computed once, transformed and stored; HyDE as the baseline."""
