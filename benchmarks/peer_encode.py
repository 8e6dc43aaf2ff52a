"""Encoding with the published PyTorch package, as a worker of the side-by-side benchmark.

It runs in an environment of its own (llm2vec-gen 0.1.3, transformers 4.56.2, peft 0.18.0, torch on CPU):

    python peer_encode.py MODEL_DIR TEXTS.json --output VECTORS.npy --dtype float32|bfloat16 --threads 2

When ready it prints {"ready": true, "peak_rss_mb"}. Then it reads commands, one a line, from stdin. "run 1" encodes
all texts once, sorted by length in batches of 32, writes the vectors, and prints one line: seconds, samples,
real_tokens and computed_tokens (compression tokens included; the latter with padding), peak_rss_mb. "quit" ends it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from llm2vec_gen.models import LLM2VecGenModel

BATCH_SIZE, MAX_LENGTH = 32, 512


def peak_rss_mb():
    """Peak resident memory of this process. (getrusage's ru_maxrss would start at the size of the parent.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def encode(model, texts):
    """Returns the vectors (n, E), float32, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    parts = [
        model.encode([texts[row] for row in order[start : start + BATCH_SIZE]], max_length=MAX_LENGTH)
        for start in range(0, len(order), BATCH_SIZE)
    ]
    vectors = torch.cat(parts).float().numpy()
    restored = np.empty_like(vectors)
    restored[order] = vectors
    return restored


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # Libraries print where they like: file descriptor 1 becomes stderr, and the replies keep the real stdout.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # the tokenizer's threads
    with open(arguments.texts) as file:
        texts = json.load(file)
    model = LLM2VecGenModel.from_pretrained(arguments.model)
    model.model.to(getattr(torch, arguments.dtype)).eval()
    tokens = {"real_tokens": 0, "computed_tokens": 0}

    def count(module, args, kwargs):
        tokens["real_tokens"] += int(kwargs["attention_mask"].sum())
        tokens["computed_tokens"] += kwargs["attention_mask"].numel()

    model.model.encoder_model.register_forward_pre_hook(count, with_kwargs=True)
    reply(ready=True, peak_rss_mb=peak_rss_mb())
    for command in sys.stdin:
        if command.strip() == "quit":
            break
        tokens.update(real_tokens=0, computed_tokens=0)
        started = time.perf_counter()
        vectors = encode(model, texts)
        seconds = time.perf_counter() - started
        np.save(arguments.output, vectors)
        reply(seconds=round(seconds, 3), samples=len(texts), **tokens, peak_rss_mb=peak_rss_mb())


if __name__ == "__main__":
    main()
