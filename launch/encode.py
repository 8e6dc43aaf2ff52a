"""python -m launch.encode MODEL input=FILES output=DIR [key=value ...]"""

import signal
import sys

from launch import start
from llm2vec_gen_jax.config import EncodeConfig


def main(path, config):
    from llm2vec_gen_jax.bulk import encode_corpus

    # Unfinished files are removed on the way out.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        manifest = encode_corpus(path, config)
    finally:
        signal.signal(signal.SIGTERM, before)
    written = sum(shard["rows"][1] - shard["rows"][0] for shard in manifest["shards"])
    print(f"written: {config.output} ({written} x {manifest['dimension']})")


if __name__ == "__main__":
    start.run(EncodeConfig, main, "MODEL")
