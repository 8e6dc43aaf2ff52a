"""Commands: `python -m launch.NAME [CONFIG] [key=value ...]`; --help lists every key with its default."""
