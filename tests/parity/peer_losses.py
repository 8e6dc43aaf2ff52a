"""The published package's supervised losses and collated texts, for test_supervised.py.

It runs in the environment of peer_reference.py:

    python peer_losses.py REQUEST.json OUT.npz

REQUEST.json holds

    inputs                  a .npz of question, positive, negative (B, E) float32, relative to the request
    losses {name: [function, {argument: value}]}    margin | contrastive | mse
    ranks                   processes that each hold B / ranks rows and gather the others'
    tokenizer (a tokenizer.json), pad_token, max_length, special_tokens
    samples [{question, answer, negative_question, negative_answer}]

OUT.npz holds, with `gathered_` before the name when computed by several ranks,

    NAME (): the loss; NAME_{question,positive,negative} (B, E): its gradients, zeros where it reads no such input
    KIND_input_ids, KIND_attention_mask: left-padded; KIND is query, repeat_answer, negative_query,
        negative_repeat_answer
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from llm2vec_gen.losses import compute_contrastive_loss, compute_margin_loss, compute_mse_loss
from peer_dataset import CustomCollator, DataSample
from transformers import PreTrainedTokenizerFast

KINDS = ("query", "repeat_answer", "negative_query", "negative_repeat_answer")


def compute(function, arguments, question, positive, negative, gather):
    if function == "margin":
        return compute_margin_loss(question, negative, **arguments, gather_across_devices=gather)
    if function == "contrastive":
        return compute_contrastive_loss(question, positive, negative, **arguments, gather_across_devices=gather)
    return compute_mse_loss(question, positive, mse_loss_weight=1.0)[1]


def gradients(inputs, losses, rank, ranks):
    """{name: array} of the rows that this rank holds; the loss is the mean over the ranks, as training averages."""
    result = {}
    for name, (function, arguments) in losses.items():
        rows = {key: torch.tensor(np.split(value, ranks)[rank], requires_grad=True) for key, value in inputs.items()}
        loss = compute(function, arguments, **rows, gather=ranks > 1)
        loss.backward()
        loss = loss.detach()
        if ranks > 1:
            torch.distributed.all_reduce(loss)
        result[name] = (loss / ranks).numpy()
        for key, value in rows.items():
            result[f"{name}_{key}"] = np.zeros_like(value.detach()) if value.grad is None else value.grad / ranks
    return result


def work(rank, ranks, folder, inputs, losses):
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    np.savez(f"{folder}/{rank}.npz", **gradients(inputs, losses, rank, ranks))
    torch.distributed.destroy_process_group()


def gathered(inputs, losses, ranks):
    """`gradients` of several processes, put together."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, inputs, losses)
        torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="fork")
        parts = [dict(np.load(f"{folder}/{rank}.npz")) for rank in range(ranks)]
    joined = {key: [part[key] for part in parts] for key in parts[0]}
    return {f"gathered_{key}": values[0] if key in losses else np.concatenate(values) for key, values in joined.items()}


def collate(folder, request):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / request["tokenizer"]),
        pad_token=request["pad_token"],
        additional_special_tokens=request["special_tokens"],
        padding_side="left",
    )
    collator = CustomCollator(tokenizer, request["special_tokens"], padding="longest", max_length=request["max_length"])
    features = collator([DataSample(id_=number, **sample) for number, sample in enumerate(request["samples"])])
    return {f"{kind}_{part}": features[f"{kind}_{part}"] for kind in KINDS for part in ("input_ids", "attention_mask")}


def main(request_path, out_path):
    torch.set_num_threads(1)
    folder, request = Path(request_path).parent, json.loads(Path(request_path).read_text())
    inputs, losses = dict(np.load(folder / request["inputs"])), request["losses"]
    result = gathered(inputs, losses, request["ranks"]) | gradients(inputs, losses, 0, 1) | collate(folder, request)
    np.savez(out_path, **result)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
