"""Commands in a checkout: `python -m launch.NAME`, the same as `llm2vec-gen NAME` of an installed package."""
