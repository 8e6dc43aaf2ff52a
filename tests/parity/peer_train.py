"""Trains a few steps with the published PyTorch package and saves as its training script saves.

It runs in the package's own environment (llm2vec-gen 0.1.3, transformers 4.56.2, peft 0.18.0, torch on CPU):

    python peer_train.py REQUEST.json OUT.npz [REQUEST.json OUT.npz ...]

REQUEST.json holds backbone, dtype, num_tokens (trained), num_read (by the heads), width (of the embedding), lora_rank,
source (a model directory to go on from, or null), checkpoint (new: OUTPUT/NAME/checkpoint-N), steps, pairs
[{question, answer}], texts. Without a source the model is made as the package's training script makes it, with random
numbers in all that trains. run_config.yml goes into the checkpoint's parent, each key several times, null as "None".

OUT.npz: embeddings (n, width), soft_prompts (n, num_read, D) of the texts after training; tokens (num_tokens, D) and
{reconstruction,alignment}_{weight,bias}, all float32.
"""

import json
import os
import sys
import types
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from llm2vec_gen.config import CustomTrainingArguments, ModelArguments
from llm2vec_gen.losses import compute_mse_loss
from llm2vec_gen.models import EncoderDecoderModel, LLM2VecGenModel, ProjectionModel, apply_peft
from llm2vec_gen.trainer import CustomTrainer
from llm2vec_gen.utils import save_args_to_yaml
from peer_dataset import CustomCollator, DataSample
from peft import TrainableTokensConfig, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


def build(request, special_tokens):
    """The model of the package's training script: (EncoderDecoderModel, tokenizer)."""
    backbone, dtype = request["backbone"], getattr(torch, request["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.padding_side = "left"
    config = AutoConfig.from_pretrained(backbone)
    config.tokenizer_original_num_tokens = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    config.num_special_tokens = len(special_tokens)
    config.special_tokens_ids = tokenizer.convert_tokens_to_ids(special_tokens)
    encoder = AutoModel.from_pretrained(backbone, config=config, torch_dtype=dtype)
    encoder.resize_token_embeddings(len(tokenizer))
    if request["lora_rank"]:
        rank = request["lora_rank"]
        encoder = apply_peft(encoder, rank, 2 * rank, special_tokens_ids=config.special_tokens_ids)
    else:
        encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=config.special_tokens_ids))
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    decoder = AutoModelForCausalLM.from_pretrained(backbone, config=config, torch_dtype=dtype)
    width = config.hidden_size
    heads = ProjectionModel(width, width, dtype=dtype), ProjectionModel(width, request["width"], dtype=dtype)
    return EncoderDecoderModel(encoder, decoder, f"last_{request['num_read']}_tokens", *heads), tokenizer


def train(model, tokenizer, special_tokens, request):
    """AdamW steps on one batch of all pairs, with zeros as targets."""
    collator = CustomCollator(tokenizer, special_tokens, padding="longest", max_length=512)
    features = collator([DataSample(id_=number, **pair) for number, pair in enumerate(request["pairs"])])
    keys = ("query_input_ids", "query_attention_mask", "answer_input_ids", "answer_attention_mask", "labels")
    model.decoder_model.requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(request["steps"]):
        optimizer.zero_grad()
        states, outputs = model(**{key: features[key] for key in keys})
        embeddings = states.mean(dim=1)
        alignment, _ = compute_mse_loss(embeddings, torch.zeros_like(embeddings), mse_loss_weight=1.0)
        (outputs["loss"] + alignment).backward()
        optimizer.step()


def main(request_path, out_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    request = json.loads(Path(request_path).read_text())
    special_tokens = [f"<question{number}>" for number in range(1, request["num_tokens"] + 1)]
    if request["source"]:
        tokenizer = AutoTokenizer.from_pretrained(request["source"])
        model = EncoderDecoderModel.from_pretrained(request["source"], causal_lm_decoder=True, is_trainable=True)
    else:
        model, tokenizer = build(request, special_tokens)
    train(model, tokenizer, special_tokens, request)
    model.eval()

    checkpoint = Path(request["checkpoint"])
    arguments = CustomTrainingArguments(output_dir=str(checkpoint.parent), use_cpu=True)
    CustomTrainer._save(types.SimpleNamespace(model=model, tokenizer=tokenizer, args=arguments), str(checkpoint))
    named = ModelArguments(
        model_name_or_path=request["backbone"],
        torch_dtype=request["dtype"],
        special_tokens=special_tokens,
        tokenizer_padding_side="left",
        encoding_mode=model.encoding_mode,
    )
    for each in (named, arguments, named):
        save_args_to_yaml(each, checkpoint.parent)

    embeddings, soft_prompts = LLM2VecGenModel(model, tokenizer).encode(request["texts"], get_recon_hidden_states=True)
    [layer] = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    [rows], [indices] = layer.trainable_tokens_delta.values(), layer.token_indices.values()
    order = [indices.index(id_) for id_ in tokenizer.convert_tokens_to_ids(special_tokens)]
    result = {"embeddings": embeddings, "soft_prompts": soft_prompts, "tokens": rows[order]}
    for name in ("reconstruction", "alignment"):
        projection = getattr(model, f"{name}_mlp").projection
        result |= {f"{name}_weight": projection.weight, f"{name}_bias": projection.bias}
    np.savez(out_path, **{name: value.detach().float().numpy() for name, value in result.items()})


if __name__ == "__main__":
    if len(sys.argv) < 3 or len(sys.argv) % 2 != 1:
        sys.exit(__doc__)
    for first in range(1, len(sys.argv), 2):
        main(*sys.argv[first : first + 2])
