"""Reference numbers from the published PyTorch package, for the parity tests.

It runs in an environment of its own (llm2vec-gen 0.1.3, transformers 4.56.2, peft 0.18.0, torch on CPU):

    python peer_reference.py MODEL_DIR REQUEST.json OUT.npz [MODEL_DIR REQUEST.json OUT.npz ...]

MODEL_DIR is a float32 model directory in the published layout. REQUEST.json holds

    texts, max_length                      encoded as one batch
    pairs [{question, answer}], targets    one training batch; targets: a .npy (B,E), relative to the request
    recon_weight, align_weight             weights of the two losses
    learning_rate, weight_decay, max_grad_norm, schedule_steps, warmup_steps, trajectory_steps
    decode_texts, max_new_tokens           greedy decoding of each text's soft prompts

OUT.npz (K compression tokens are read, N are trained; heads in torch's orientation (out,in)) holds

    embeddings (n,E), soft_prompts (n,K,D), input_ids (n,T), attention_mask (n,T): left-padded
    batch_*: what the collator made of the pairs; reconstruction_loss, alignment_loss ()
    grad_tokens (N,D) in the order of the special tokens, grad_{reconstruction,alignment}_{weight,bias}
    lora:KEY: the gradient of each LoRA matrix, by its name in the adapter's file
    trajectory, trajectory_{reconstruction,alignment,grad_norm,learning_rate} (steps,): the losses, the norm
        before clipping and the learning rate of each AdamW step, all taken before its update
    decoded_ids (n_decode, max_new_tokens): -1 after the first end token
"""

import json
import os
import sys
from pathlib import Path

# The package moves a model to the GPU when it sees one; the reference is CPU float32.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from llm2vec_gen.losses import compute_mse_loss
from llm2vec_gen.models import LLM2VecGenModel
from peer_dataset import CustomCollator, DataSample
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from transformers import Trainer, get_linear_schedule_with_warmup

BATCH_KEYS = (
    "query_input_ids",
    "query_attention_mask",
    "answer_input_ids",
    "answer_attention_mask",
    "labels",
)


def encode(model, request):
    """Embeddings and soft prompts of the texts, with the ids that the encoder was really given."""
    given = {}
    hook = model.model.encoder_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    embeddings, soft_prompts = model.encode(
        request["texts"], max_length=request["max_length"], get_recon_hidden_states=True
    )
    hook.remove()
    return {
        "embeddings": embeddings,
        "soft_prompts": soft_prompts,
        "input_ids": given["input_ids"],
        "attention_mask": given["attention_mask"],
    }


def decode(model, request):
    """Greedy continuation of each text's soft prompts, one at a time: batches never stop at an end token."""
    decoded = torch.full((len(request["decode_texts"]), request["max_new_tokens"]), -1)
    unread = torch.ones(1, 1, dtype=torch.long)  # generate() wants ids, but given soft prompts ignores them
    for row, text in enumerate(request["decode_texts"]):
        _, soft_prompts = model.encode(text, max_length=request["max_length"], get_recon_hidden_states=True)
        ids = model.model.generate(
            unread, unread, max_new_tokens=request["max_new_tokens"], decoder_inputs_embeds=soft_prompts
        )
        decoded[row, : ids.shape[1]] = ids[0]
    return {"decoded_ids": decoded}


def unfreeze(model):
    """Leave the compression-token rows, the two heads and any LoRA trainable, and nothing else: loading froze them.

    Returns the parameter of the rows, and its row numbers in the order of the special tokens.
    """
    model.model.requires_grad_(False)
    [layer] = [module for module in model.model.modules() if isinstance(module, TrainableTokensLayer)]
    [rows] = layer.trainable_tokens_delta.values()
    [indices] = layer.token_indices.values()
    rows.requires_grad_(True)
    model.model.reconstruction_mlp.requires_grad_(True)
    model.model.alignment_mlp.requires_grad_(True)
    for _, matrix in lora_matrices(model):
        matrix.requires_grad_(True)
    special_ids = model.tokenizer.convert_tokens_to_ids(model.tokenizer.additional_special_tokens)
    return rows, [indices.index(token_id) for token_id in special_ids]


def lora_matrices(model):
    """[(name in the adapter's file, parameter)]."""
    named = model.model.encoder_model.named_parameters()
    return [(name.replace(".default", ""), matrix) for name, matrix in named if ".lora_" in name]


def collate(model, request):
    collator = CustomCollator(
        model.tokenizer,
        model.tokenizer.additional_special_tokens,
        padding="longest",
        max_length=request["max_length"],
    )
    samples = [DataSample(id_=i, **pair) for i, pair in enumerate(request["pairs"])]
    features = collator(samples)
    return {key: features[key] for key in BATCH_KEYS}


def compute_losses(model, batch, targets, request):
    """(total, reconstruction, alignment), combined as the published training script combines them."""
    states, outputs = model.model(**batch)
    weighted_alignment, alignment = compute_mse_loss(
        states.mean(dim=1), targets, mse_loss_weight=request["align_weight"]
    )
    return request["recon_weight"] * outputs["loss"] + weighted_alignment, outputs["loss"], alignment


def gradients(model, batch, targets, request, rows, row_order):
    total, reconstruction, alignment = compute_losses(model, batch, targets, request)
    total.backward()
    result = {
        "reconstruction_loss": reconstruction,
        "alignment_loss": alignment,
        "grad_tokens": rows.grad[row_order],
    }
    for name in ("reconstruction", "alignment"):
        projection = getattr(model.model, f"{name}_mlp").projection
        result[f"grad_{name}_weight"] = projection.weight.grad
        result[f"grad_{name}_bias"] = projection.bias.grad
    result |= {f"lora:{name}": matrix.grad for name, matrix in lora_matrices(model)}
    return {name: value.clone() for name, value in result.items()}


def trajectory(model, batch, targets, request):
    """Losses of consecutive updates on one batch, in the Trainer's order: clip, update, move the schedule."""
    trainable = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, model.model))  # the biases are not in it
    groups = [
        {
            "params": [p for name, p in trainable.items() if name in decayed],
            "weight_decay": request["weight_decay"],
        },
        {
            "params": [p for name, p in trainable.items() if name not in decayed],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=request["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = get_linear_schedule_with_warmup(optimizer, request["warmup_steps"], request["schedule_steps"])
    steps = []
    for _ in range(request["trajectory_steps"]):
        optimizer.zero_grad()
        total, reconstruction, alignment = compute_losses(model, batch, targets, request)
        total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(list(trainable.values()), request["max_grad_norm"])
        measured = (total, reconstruction, alignment, grad_norm)
        steps.append([value.item() for value in measured] + schedule.get_last_lr()[:1])
        optimizer.step()
        schedule.step()
    names = ("", "_reconstruction", "_alignment", "_grad_norm", "_learning_rate")
    columns = torch.tensor(steps).reshape(-1, len(names)).T
    return {f"trajectory{name}": column for name, column in zip(names, columns)}


def main(model_dir, request_path, out_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    request = json.loads(Path(request_path).read_text())
    model = LLM2VecGenModel.from_pretrained(model_dir)
    # Only LoRA has dropout. A model without it gives the same numbers in train mode.
    model.model.eval()

    result = encode(model, request) | decode(model, request)
    rows, row_order = unfreeze(model)
    batch = collate(model, request)
    result |= {f"batch_{name}": value for name, value in batch.items()}
    targets = torch.from_numpy(np.load(Path(request_path).parent / request["targets"]))
    result |= gradients(model, batch, targets, request, rows, row_order)
    result |= trajectory(model, batch, targets, request)
    np.savez(out_path, **{name: value.detach().numpy() for name, value in result.items()})


if __name__ == "__main__":
    if len(sys.argv) < 4 or len(sys.argv) % 3 != 1:
        sys.exit(__doc__)
    for first in range(1, len(sys.argv), 3):
        main(*sys.argv[first : first + 3])
