"""Worker process for the published PyTorch package, on random weights; side.Side defines the protocol.

Runs in a separate environment (llm2vec-gen 0.1.3, transformers 4.56.2, peft 0.18.0, torch) without this package:

    python peer.py SPEC.json

SPEC.json: kind (train | encode | generate), architecture (a config.json), dtype, device (cpu | cuda), threads,
batch_size, num_tokens, and the keys that the class of the kind documents. Texts are random ids of these lengths,
left-padded to the longest of their batch as by the package's collator; creating a batch is not timed.
"""

import importlib.util
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from llm2vec_gen.losses import compute_mse_loss, get_teacher_embeddings
from llm2vec_gen.models import EncoderDecoderModel, LLM2VecGenModel, ProjectionModel
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    get_linear_schedule_with_warmup,
)

# The package's conf/: training/llm2vec-gen.
RECON_WEIGHT, ALIGN_WEIGHT = 1.0, 1.0
LEARNING_RATE = 5e-4
WARMUP_STEPS, SCHEDULE_STEPS = 100, 20_000
MAX_GRAD_NORM = 1.0
MAX_LENGTH = 512


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    # Libraries may print to stdout: redirect file descriptor 1 to stderr, and keep the real stdout for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cuda = spec["device"] == "cuda"

    def answer(work):
        try:
            result = work()
        except (torch.OutOfMemoryError, MemoryError):
            result = {"error": "out of memory"}
        print(json.dumps({**result, "peak_bytes": peak_bytes(cuda)}), file=answers, flush=True)

    if cuda and not torch.cuda.is_available():
        answer(lambda: {"error": "this environment's torch has no CUDA device"})
        return
    torch.set_num_threads(spec["threads"])
    os.environ["RAYON_NUM_THREADS"] = str(spec["threads"])  # the tokenizer's threads
    torch.manual_seed(0)
    kind, workers = {"train": Training, "encode": Encoding, "generate": Generation}[spec["kind"]], []
    ready = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "matmul_flops": matmul_flops(spec),
        "attention": attention(spec),
    }
    answer(lambda: workers.append(kind(spec)) or ready)
    for line in sys.stdin:
        answer(lambda: workers[0].run(**json.loads(line)))  # noqa: B023


def synchronize(spec):
    if spec["device"] == "cuda":
        torch.cuda.synchronize()


def matmul_flops(spec, size=2048):
    """Returns the FLOPs per second of a product of two square matrices, the best of five."""
    x = torch.ones((size, size), dtype=getattr(torch, spec["dtype"]), device=spec["device"])
    best = float("inf")
    for _ in range(6):
        synchronize(spec)
        started = time.perf_counter()
        x @ x
        synchronize(spec)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_bytes(cuda):
    """Returns the peak memory in bytes: of the GPU, or of this process on a CPU."""
    if cuda and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:  # getrusage would include the size of the parent
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024


def attention(spec):
    """Returns the fastest attention implementation of this environment."""
    flash = importlib.util.find_spec("flash_attn") and spec["device"] == "cuda" and spec["dtype"] != "float32"
    return "flash_attention_2" if flash else "sdpa"


def random_model(spec, kind):
    """Returns an AutoModel or AutoModelForCausalLM with random weights, created on the device."""
    values = {"bos_token_id": None, "eos_token_id": None} | spec["architecture"]
    config = AutoConfig.for_model(**values)
    config.num_special_tokens = spec["num_tokens"]
    with torch.device(spec["device"]):
        return kind.from_config(
            config, torch_dtype=getattr(torch, spec["dtype"]), attn_implementation=attention(spec)
        ).to(spec["device"])


def random_encoder_decoder(spec, decodes):
    """Returns the model of the package's scripts/train.py: encoder with trainable tokens, frozen decoder, two heads."""
    encoder = random_model(spec, AutoModel)
    rows = encoder.get_input_embeddings().weight.shape[0]
    encoder.resize_token_embeddings(rows + spec["num_tokens"], mean_resizing=False)
    special_ids = list(range(rows, rows + spec["num_tokens"]))
    encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=special_ids))
    decoder = random_model(spec, AutoModelForCausalLM).requires_grad_(False) if decodes else None
    width, dtype = encoder.config.hidden_size, getattr(torch, spec["dtype"])
    model = EncoderDecoderModel(
        encoder_model=encoder,
        decoder_model=decoder,
        encoding_mode=f"last_{spec['num_tokens']}_tokens",
        reconstruction_mlp=ProjectionModel(width, width, dtype=dtype),
        alignment_mlp=ProjectionModel(width, width, dtype=dtype),
    )
    return model.to(spec["device"]), special_ids


def random_ids(lengths, vocab_size):
    """Returns an array of random ids for each length."""
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length) for length in lengths]


def left_padded(rows, then, device):
    """Returns (ids, mask) of id lists, each followed by the ids `then`, left-padded to the longest."""
    width = max(map(len, rows)) + len(then)
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) - len(then) :] = [*row, *then]
        mask[number, width - len(row) - len(then) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class Training:
    """spec: queries, answers (lengths by row), checkpointing (bool).

    The teacher of the published training is LLM2Vec: bidirectional, with LoRA on every layer. Here it is the causal
    backbone with a LoRA of rank 1 on one matrix, which is not more expensive.
    """

    def __init__(self, spec):
        self.spec = spec
        self.model, self.special_ids = random_encoder_decoder(spec, decodes=True)
        teacher = random_model(spec, AutoModel)
        teacher = get_peft_model(teacher, LoraConfig(r=1, target_modules=r".*layers\.0\.self_attn\.q_proj"))
        self.teacher = teacher.requires_grad_(False).eval()
        vocab_size = spec["architecture"]["vocab_size"]
        self.queries, self.answers = (random_ids(spec[name], vocab_size) for name in ("queries", "answers"))
        if spec["checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # as the Trainer does; layers checkpoint in train mode only
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Fused is the Trainer's default.
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, WARMUP_STEPS, SCHEDULE_STEPS)

    def run(self, batches):
        """Trains one step per batch, a list of rows, with the loop of Trainer and the loss of LLM2VecGenTrainer."""
        features = [self._features(rows) for rows in batches]
        synchronize(self.spec)
        started = time.perf_counter()
        for batch in features:
            loss = self._loss(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        last = loss.item()
        synchronize(self.spec)
        return {"seconds": time.perf_counter() - started, "loss": last}

    def _features(self, rows):
        device = self.spec["device"]
        query = left_padded([self.queries[row] for row in rows], self.special_ids, device)
        return *query, *left_padded([self.answers[row] for row in rows], [], device)

    def _loss(self, query_ids, query_mask, answer_ids, answer_mask):
        """Without negatives and with other_sub_losses_weight 0."""
        labels = torch.where(answer_mask == 0, -100, answer_ids)
        states, outputs = self.model(query_ids, query_mask, answer_ids, answer_mask, labels)
        targets = get_teacher_embeddings(answer_ids, answer_mask, self.teacher, student_encoder_states=states)
        alignment, _ = compute_mse_loss(states.mean(dim=1), targets, mse_loss_weight=ALIGN_WEIGHT)
        return RECON_WEIGHT * outputs["loss"] + alignment


class Encoding:
    """spec: lengths of the texts; or folder (a model directory), texts and vectors (the .npy to write)."""

    def __init__(self, spec):
        self.spec, self.special_ids = spec, []
        if "folder" in spec:
            self.loaded = LLM2VecGenModel.from_pretrained(spec["folder"])
            self.loaded.device = spec["device"]
            self.model = self.loaded.model.to(spec["device"], getattr(torch, spec["dtype"])).eval()
        else:
            self.model, self.special_ids = random_encoder_decoder(spec, decodes=False)
            self.model.eval()
            self.ids = random_ids(spec["lengths"], spec["architecture"]["vocab_size"])
        self.computed_tokens = 0
        self.model.encoder_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.computed_tokens += kwargs["attention_mask"].numel()

    def run(self):
        """Encodes all texts in batches sorted by length, as in the package's evaluation."""
        self.computed_tokens, size = 0, self.spec["batch_size"]
        texts = self.spec.get("texts") or self.ids
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        batches = [[texts[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
        if "texts" not in self.spec:
            batches = [left_padded(batch, self.special_ids, self.spec["device"]) for batch in batches]
        synchronize(self.spec)
        started = time.perf_counter()
        with torch.no_grad():
            vectors = torch.cat([self._encode(batch) for batch in batches]).float().cpu().numpy()
        seconds = time.perf_counter() - started
        if "vectors" in self.spec:
            restored = np.empty_like(vectors)
            restored[order] = vectors
            np.save(self.spec["vectors"], restored)
        return {"seconds": seconds, "computed_tokens": self.computed_tokens}

    def _encode(self, batch):
        if "texts" in self.spec:
            return self.loaded.encode(batch, max_length=MAX_LENGTH)
        states, _ = self.model.encode(query_input_ids=batch[0], query_attention_mask=batch[1])
        return states.mean(dim=1)


class Generation:
    """spec: prompts (lengths of one batch). Generates with transformers, as the package does."""

    def __init__(self, spec):
        self.spec = spec
        self.model = random_model(spec, AutoModelForCausalLM).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = random_ids(spec["prompts"], spec["architecture"]["vocab_size"])
        self.ids, self.mask = left_padded(ids, [], spec["device"])

    def run(self, new_tokens):
        """Generates new_tokens for every prompt, greedily. prefill_seconds is the time for the first token only."""
        prefill, _ = self._timed(1)
        seconds, count = self._timed(new_tokens)
        return {"seconds": seconds, "prefill_seconds": prefill, "new_tokens": count}

    def _timed(self, new_tokens):
        synchronize(self.spec)
        started = time.perf_counter()
        with torch.no_grad():
            ids = self.model.generate(self.ids, attention_mask=self.mask, max_new_tokens=new_tokens)
        synchronize(self.spec)
        return time.perf_counter() - started, (ids.shape[1] - self.ids.shape[1]) * len(ids)


if __name__ == "__main__":
    main()
