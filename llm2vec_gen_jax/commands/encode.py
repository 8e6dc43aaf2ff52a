"""Encodes a corpus into embedding shards and a manifest.

python -m launch.encode MODEL input=FILES output=DIR [key=value ...]
"""

import signal
import sys

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import EncodeConfig


def main(path: str, config: EncodeConfig) -> None:
    """Encodes a corpus. On a signal, removes unfinished files and exits with 143 (SIGTERM) or 130 (SIGINT)."""
    from llm2vec_gen_jax.serving.encode_corpus import encode_corpus

    received = []

    def handle(number, _):
        received.append(number)
        raise_if_stopped()

    def raise_if_stopped():
        if received:
            if received[0] == signal.SIGTERM:
                sys.exit(143)
            raise KeyboardInterrupt

    # An exception raised by a handler can be lost, for example in a destructor: encode_corpus checks again.
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        manifest = encode_corpus(path, config, raise_if_stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    written = sum(shard["rows"][1] - shard["rows"][0] for shard in manifest["shards"])
    print(f"written: {config.output} ({written} x {manifest['dimension']})")
    for key, which in (("cut", f"longer than max_length={config.max_length} and were truncated"), ("empty", "empty")):
        if number := sum(
            shard.get(key, 0) for shard in manifest["shards"]
        ):  # manifests of older versions have no counts
            print(f"texts that are {which}: {number}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(EncodeConfig, main, "MODEL")
