"""Texts, any number, to shards of vectors and a manifest.

python -m launch.encode MODEL input=FILES output=DIR [key=value ...]
"""

import signal
import sys

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import EncodeConfig


def main(path, config):
    """Encodes, unless told to stop; then cleans up and ends with 143 (SIGTERM) or 130 (SIGINT)."""
    from llm2vec_gen_jax.serving.encode_corpus import encode_corpus

    came = []

    def stop(number, _):
        came.append(number)
        end()

    def end():
        if came:
            if came[0] == signal.SIGTERM:
                sys.exit(143)
            raise KeyboardInterrupt

    # Unfinished files are removed on the way out. What a handler raises can be lost, inside a destructor for example:
    # the work asks again.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        manifest = encode_corpus(path, config, end)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    written = sum(shard["rows"][1] - shard["rows"][0] for shard in manifest["shards"])
    print(f"written: {config.output} ({written} x {manifest['dimension']})")
    for key, what in (("cut", f"longer than max_length={config.max_length} and were cut"), ("empty", "empty")):
        if number := sum(shard.get(key, 0) for shard in manifest["shards"]):  # folders of before have no such counts
            print(f"texts that are {what}: {number}")


def run():
    """Runs the command with the words of sys.argv."""
    cli.run(EncodeConfig, main, "MODEL")
