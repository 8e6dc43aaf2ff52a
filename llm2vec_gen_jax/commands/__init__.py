"""The commands: `llm2vec-gen NAME`, and `python -m launch.NAME` in a checkout."""
