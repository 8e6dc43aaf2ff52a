"""Encodes and decodes with a model directory in PyTorch, for `launch.convert verify`. A script, not imported.

usage: PYTHON pytorch_encode.py MODEL_DIR REQUEST.json OUT.npz

It runs in an environment that may lack JAX. If the published package (`llm2vec-gen`) is installed there, it is used;
otherwise transformers and peft with the package's recipe. REQUEST.json: batches of texts, decode (the number of texts
to decode), max_length, max_new_tokens. OUT.npz: embeddings (n, E), soft_prompts (n, K, D), ids_<i> of the decoded
texts. Prints the package versions as a line of JSON.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # compare on the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


class PlainReader:
    """The published recipe with any version of transformers and peft."""

    def __init__(self, directory: Path) -> None:
        run = yaml.load((directory / "run_config.yml").read_text(), Loader=yaml.BaseLoader)  # every value is text
        backbone, dtype = run["model_name_or_path"], getattr(torch, run["torch_dtype"])
        self.count = int(re.fullmatch(r"last_(\d+)_tokens", run["encoding_mode"])[1])
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self.special = run["special_tokens"]
        # The decoder first: peft modifies the encoder in place.
        self.decoder = AutoModelForCausalLM.from_pretrained(backbone, trust_remote_code=False).to(dtype).eval()
        encoder = AutoModel.from_pretrained(backbone, trust_remote_code=False).to(dtype)
        encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.encoder = PeftModel.from_pretrained(encoder, directory / "encoder").eval()
        self.heads = [self._head(directory / f"{name}_mlp") for name in ("reconstruction", "alignment")]

    @staticmethod
    def _head(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        state = torch.load(path, weights_only=True)["state_dict"]
        return lambda x: torch.nn.functional.linear(x, state["projection.weight"], state["projection.bias"])

    def encode(self, texts: list[str], max_length: int) -> Any:
        """Returns (embeddings (n, E), soft prompts (n, K, D)) of one batch of texts."""
        texts = [text + "".join(self.special) for text in texts]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        ids = batch["input_ids"]
        special = torch.tensor(self.tokenizer.convert_tokens_to_ids(self.special))
        cut = torch.isin(ids, special).sum(dim=1) < len(special)
        ids[cut, -len(special) :] = special
        hidden = self.encoder(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
        soft_prompts = self.heads[0](hidden[:, -self.count :])
        return self.heads[1](soft_prompts).mean(dim=1), soft_prompts

    def decode(self, soft_prompt: torch.Tensor, max_new_tokens: int) -> list[int]:
        """Returns greedily decoded ids of a soft prompt (K, D), without a cache, as the published package."""
        embeds, table, ids = soft_prompt[None], self.decoder.get_input_embeddings(), []
        for _ in range(max_new_tokens):
            ids.append(int(self.decoder(inputs_embeds=embeds).logits[0, -1].argmax()))
            embeds = torch.cat([embeds, table(torch.tensor([[ids[-1]]]))], dim=1)
        return ids


class PublishedReader:
    """The published package."""

    def __init__(self, directory: Path) -> None:
        from llm2vec_gen.models import LLM2VecGenModel

        self.model = LLM2VecGenModel.from_pretrained(str(directory))
        self.model.model.eval()

    def encode(self, texts: list[str], max_length: int) -> Any:
        """Returns (embeddings (n, E), soft prompts (n, K, D)) of one batch of texts."""
        return self.model.encode(texts, max_length=max_length, get_recon_hidden_states=True)

    def decode(self, soft_prompt: torch.Tensor, max_new_tokens: int) -> list[int]:
        """Returns greedily decoded ids of a soft prompt (K, D)."""
        unused = torch.ones(1, 1, dtype=torch.long)  # generate() requires ids, and ignores them for soft prompts
        ids = self.model.model.generate(
            unused, unused, max_new_tokens=max_new_tokens, decoder_inputs_embeds=soft_prompt[None]
        )
        return ids[0].tolist()


@torch.no_grad()
def main(directory: str, request_path: str, out_path: str) -> None:
    """Encodes and decodes the texts of the request with the model directory, and writes the results."""
    request = json.loads(Path(request_path).read_text())
    published = importlib.util.find_spec("llm2vec_gen") is not None
    reader = (PublishedReader if published else PlainReader)(Path(directory))
    parts = [reader.encode(texts, request["max_length"]) for texts in request["batches"]]
    embeddings, soft_prompts = (torch.cat(part) for part in zip(*parts))
    arrays = {"embeddings": embeddings, "soft_prompts": soft_prompts}
    arrays = {name: value.float().numpy() for name, value in arrays.items()}
    for row in range(request["decode"]):
        arrays[f"ids_{row}"] = np.array(reader.decode(soft_prompts[row], request["max_new_tokens"]), np.int64)
    np.savez(out_path, **arrays)
    packages = (["llm2vec-gen"] if published else []) + ["transformers", "peft", "torch"]
    print(json.dumps([f"{name} {importlib.metadata.version(name)}" for name in packages]))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
