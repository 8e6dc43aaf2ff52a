"""Scores of embedders on task folders and on mteb's benchmarks."""
