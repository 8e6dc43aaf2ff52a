"""Commands: `python -m launch.NAME`, or `llm2vec-gen NAME`; --help lists every key with its default."""
