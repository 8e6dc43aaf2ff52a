"""Training steps of the published PyTorch package, as a worker of the side-by-side benchmark.

It runs in an environment of its own (llm2vec-gen 0.1.3, transformers 4.56.2, peft 0.18.0, torch on CPU):

    python peer_step.py HF_BACKBONE_DIR PAIRS.jsonl --dtype float32|bfloat16 --checkpointing on|off
                        --batch-size 8 --threads 2

PAIRS.jsonl has one {"question", "answer"} per line. The set-up follows the package's scripts/train.py: an
encoder with trainable compression tokens, a second copy of the backbone as frozen decoder, a third as
teacher, the two heads, the package's collator, losses and gradient checkpointing, and the Trainer's
optimizer, clipping and schedule. (The teacher there is LLM2Vec: bidirectional, with LoRA on every layer.
Here it is the causal backbone with rank 1 on one matrix, which costs no more.)

When ready it prints {"ready": true, "peak_rss_mb"}. Then it reads commands, one a line, from stdin. "run N"
trains N steps and prints one line:

    seconds          wall time, collation and the teacher's forward pass included
    samples          N * batch size
    real_tokens      query and answer tokens, compression tokens and soft prompts, without padding
    computed_tokens  the same with padding (neither counts the teacher's pass)
    peak_rss_mb      of the process so far, loading included
    loss             of the last step

"quit" ends it. stdout carries these JSON lines and nothing else.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import time
import types
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from llm2vec_gen.losses import compute_mse_loss, get_teacher_embeddings
from llm2vec_gen.models import EncoderDecoderModel, ProjectionModel
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

if importlib.util.find_spec("datasets") is None:
    # The collator's package also imports `datasets`, for a Hub loader that is not used here. The stand-in
    # goes away again, because other libraries ask whether `datasets` is there.
    sys.modules["datasets"] = types.SimpleNamespace(Dataset=None, load_dataset=None)
    from llm2vec_gen.dataset import CustomCollator, DataSample

    del sys.modules["datasets"]
else:
    from llm2vec_gen.dataset import CustomCollator, DataSample

# The package's conf/: special_tokens/total_10, model/default, training/llm2vec-gen.
SPECIAL_TOKENS = [f"<question{i}>" for i in range(1, 11)]
MAX_LENGTH = 512
RECON_WEIGHT, ALIGN_WEIGHT = 1.0, 1.0
LEARNING_RATE = 5e-4
WARMUP_STEPS, SCHEDULE_STEPS = 100, 20_000
MAX_GRAD_NORM = 1.0
SEED = 42

STUDENT_KEYS = (
    "query_input_ids",
    "query_attention_mask",
    "answer_input_ids",
    "answer_attention_mask",
    "labels",
)


def load_tokenizer(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def build_model(backbone, tokenizer, dtype):
    """Encoder with trainable token rows, frozen decoder, two heads: the model of scripts/train.py."""
    special_ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    config = AutoConfig.from_pretrained(backbone)
    config.num_special_tokens = len(SPECIAL_TOKENS)
    load = dict(config=config, torch_dtype=dtype, attn_implementation="sdpa")

    encoder = AutoModel.from_pretrained(backbone, **load)
    encoder.resize_token_embeddings(len(tokenizer))
    encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=special_ids))
    decoder = AutoModelForCausalLM.from_pretrained(backbone, **load)
    decoder.requires_grad_(False)
    width = config.hidden_size
    return EncoderDecoderModel(
        encoder_model=encoder,
        decoder_model=decoder,
        encoding_mode="last_10_tokens",
        reconstruction_mlp=ProjectionModel(width, width, dtype=dtype),
        alignment_mlp=ProjectionModel(width, width, dtype=dtype),
    )


def build_teacher(backbone, dtype):
    """The backbone as a PeftModel, which is what get_teacher_embeddings accepts."""
    teacher = AutoModel.from_pretrained(backbone, torch_dtype=dtype, attn_implementation="sdpa")
    teacher = get_peft_model(teacher, LoraConfig(r=1, target_modules=r".*layers\.0\.self_attn\.q_proj"))
    return teacher.requires_grad_(False).eval()


def read_batches(path, collator, batch_size):
    """Batches without end: the file's pairs, shuffled once, in turn."""
    with open(path) as lines:
        pairs = [json.loads(line) for line in lines]
    samples = [DataSample(id_=i, question=p["question"], answer=p["answer"]) for i, p in enumerate(pairs)]
    random.Random(SEED).shuffle(samples)
    start = 0
    while True:
        yield collator([samples[(start + i) % len(samples)] for i in range(batch_size)])
        start += batch_size


def compute_loss(model, teacher, features):
    """LLM2VecGenTrainer.compute_loss without negatives and with other_sub_losses_weight 0."""
    states, outputs = model(**{key: features[key] for key in STUDENT_KEYS})
    targets = get_teacher_embeddings(
        features["teacher_answer_input_ids"],
        features["teacher_answer_attention_mask"],
        teacher,
        student_encoder_states=states,
    )
    alignment, _ = compute_mse_loss(states.mean(dim=1), targets, mse_loss_weight=ALIGN_WEIGHT)
    return RECON_WEIGHT * outputs["loss"] + alignment


def count_tokens(features):
    """(real, computed) tokens of the encoder's and the decoder's pass, which also reads K soft prompts."""
    query, answer = features["query_attention_mask"], features["answer_attention_mask"]
    soft_prompts = len(query) * len(SPECIAL_TOKENS)
    return (query.sum() + answer.sum()).item() + soft_prompts, query.numel() + answer.numel() + soft_prompts


def peak_rss_mb():
    """Peak resident memory of this process. (getrusage's ru_maxrss would start at the size of the parent.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("pairs")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--checkpointing", choices=("on", "off"), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    # Libraries print where they like: file descriptor 1 becomes stderr, and the replies keep the real stdout.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # the tokenizer's threads
    torch.manual_seed(SEED)
    dtype = getattr(torch, arguments.dtype)

    tokenizer = load_tokenizer(arguments.backbone)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    model = build_model(arguments.backbone, tokenizer, dtype)
    teacher = build_teacher(arguments.backbone, dtype)
    collator = CustomCollator(
        tokenizer=tokenizer,
        special_tokens=SPECIAL_TOKENS,
        teacher_tokenizer=load_tokenizer(arguments.backbone),
        teacher_special_tokens=[],
        padding="longest",
        max_length=MAX_LENGTH,
    )
    batches = read_batches(arguments.pairs, collator, arguments.batch_size)

    if arguments.checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # as the Trainer does; layers checkpoint in train mode only
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused is the Trainer's default.
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, SCHEDULE_STEPS)
    reply(ready=True, peak_rss_mb=peak_rss_mb())

    for command in sys.stdin:
        if command.strip() == "quit":
            break
        steps = int(command.removeprefix("run "))
        real_tokens = computed_tokens = 0
        begin = time.perf_counter()
        for _ in range(steps):
            features = next(batches)
            loss = compute_loss(model, teacher, features)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            real, computed = count_tokens(features)
            real_tokens += real
            computed_tokens += computed
        seconds = time.perf_counter() - begin
        reply(
            seconds=seconds,
            samples=steps * arguments.batch_size,
            real_tokens=real_tokens,
            computed_tokens=computed_tokens,
            peak_rss_mb=peak_rss_mb(),
            loss=loss.item(),
        )


if __name__ == "__main__":
    main()
