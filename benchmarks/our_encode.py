"""Encoding with this package, as a worker of benchmarks/encode.py; the protocol is peer_encode.py's.

python -m benchmarks.our_encode MODEL_DIR TEXTS.json --output VECTORS.npy --batch-size 32
"""

import argparse
import json
import sys
import time

import numpy as np

from benchmarks.our_step import peak_rss_mb, say
from llm2vec_gen_jax import LLM2VecGen, encode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    with open(arguments.texts) as file:
        texts = json.load(file)
    model = LLM2VecGen.from_pretrained(arguments.model, dtype=arguments.dtype)
    lengths = [len(ids) + model.model.num_appended for ids in model.tokenize(texts)]
    computed = encode.computed_tokens(encode.plan(lengths, arguments.batch_size, 1))
    say(ready=True, peak_rss_mb=peak_rss_mb())
    for command in sys.stdin:
        if command.split()[0] == "quit":
            break
        started = time.perf_counter()
        vectors = model.encode(texts, batch_size=arguments.batch_size)
        seconds = time.perf_counter() - started
        np.save(arguments.output, vectors)
        tokens = {"real_tokens": sum(lengths), "computed_tokens": computed}
        say(seconds=round(seconds, 3), samples=len(texts), **tokens, peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
