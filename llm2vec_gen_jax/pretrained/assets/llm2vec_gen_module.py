"""LLM2Vec-Gen (arXiv 2603.10913) as a sentence-transformers module in PyTorch: sentence-transformers >= 6 and peft.

llm2vec_gen_jax writes this file into its model directories, next to the files that it reads:

    run_config.yml                                     backbone (a folder or hub id), dtype, special tokens
    encoder_decoder_config.json                        the number K of compression tokens
    encoder/                                           PEFT adapter: embeddings of the special tokens, LoRA if any
    reconstruction_mlp.safetensors, alignment_mlp.safetensors
    tokenizer.json                                     the backbone's tokenizer with the special tokens added
    llm2vec_gen_jax.json                               revision of a backbone on the hub, if it is not main

The M special tokens are thought tokens, then K compression tokens. All of them are appended to a text. D hidden size,
E embedding size, B texts, T tokens.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel

OTHER_WRITERS = ("README.md", "modules.json", "config_sentence_transformers.json", "__pycache__", ".git", ".cache")


class LLM2VecGenModule(InputModule):
    """Tokenizer, encoder and heads of a model directory. The weights are frozen.

    max_seq_length: maximum tokens per text, including the special tokens.
    """

    config_file_name = "sentence_bert_config.json"
    config_keys = ["max_seq_length"]

    def __init__(self, folder: str, backbone_options: dict[str, Any] | None = None, max_seq_length: int = 512) -> None:
        """Reads a local model directory and loads its backbone.

        backbone_options: arguments of AutoModel.from_pretrained; dtype is by default that of run_config.yml.
        Raises FileNotFoundError if the backbone does not exist, ValueError if a setting is not supported.
        """
        super().__init__()
        self.folder, self.max_seq_length = Path(folder), max_seq_length
        run = yaml.load((self.folder / "run_config.yml").read_text("utf-8"), Loader=yaml.BaseLoader)  # values are text
        mode = json.loads((self.folder / "encoder_decoder_config.json").read_text("utf-8"))["encoding_mode"]
        if not (match := re.fullmatch(r"last_(\d+)_tokens", mode)):
            raise ValueError(f"{self.folder}/encoder_decoder_config.json: encoding_mode is {mode!r}")
        self.num_tokens = int(match[1])
        self.tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.special_ids = [self.tokenizer.token_to_id(token) for token in run["special_tokens"]]

        options = dict(backbone_options or {})
        chosen = [options.pop(key, None) for key in ("dtype", "torch_dtype")]
        dtype = next((value for value in chosen if value not in (None, "auto")), run["torch_dtype"])
        backbone = self._load_backbone(run["model_name_or_path"], options)
        backbone.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch.")))
        backbone.resize_token_embeddings(self.tokenizer.get_vocab_size(), mean_resizing=False)
        self.encoder = PeftModel.from_pretrained(backbone, str(self.folder / "encoder"))
        self.reconstruction, self.alignment = (self._load_head(name) for name in ("reconstruction", "alignment"))
        self.requires_grad_(False).eval()

    def _load_backbone(self, name, options):
        path = Path(name).expanduser()
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.exists()
        if not (path.is_dir() or is_hub_id):
            problem = "not a folder" if path.exists() else "no such folder"
        else:
            if not path.is_dir():
                options = {"revision": self._read_backbone_revision(), **options}
            try:
                return AutoModel.from_pretrained(path if path.is_dir() else name, trust_remote_code=False, **options)
            except OSError as error:  # raised by transformers for missing files and failed downloads
                problem = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"the backbone {name} cannot be loaded ({problem}). Set model_name_or_path in "
            f"{self.folder / 'run_config.yml'} to a Hugging Face folder or hub id"
        ) from None

    def _read_backbone_revision(self):
        file = self.folder / "llm2vec_gen_jax.json"
        return (json.loads(file.read_text("utf-8")).get("backbone_revision") if file.exists() else None) or "main"

    def _load_head(self, name):
        state = load_file(self.folder / f"{name}_mlp.safetensors")
        weight, bias = state["projection.weight"], state["projection.bias"]
        head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        return head

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Returns right-padded input_ids and attention_mask (B, T) of the texts with the special tokens appended.

        prompt: prepended to every text, without a space. Texts are truncated so that T <= max_seq_length.
        Raises ValueError for an input that is not a string, and if max_seq_length leaves no token for the text.
        """
        if not all(isinstance(text, str) for text in inputs):
            raise ValueError("the inputs must be strings")
        length = self.max_seq_length - len(self.special_ids)
        if length < 1:
            raise ValueError(f"max_seq_length must exceed the {len(self.special_ids)} appended tokens")
        # The literal of a control token in a text is text. Set here because pickling does not keep it.
        self.tokenizer.encode_special_tokens = True
        encodings = self.tokenizer.encode_batch([(prompt or "") + text for text in inputs])
        rows = [torch.tensor(encoding.ids[:length] + self.special_ids) for encoding in encodings]
        masks = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """Adds sentence_embedding (B, E). The padding may be on either side."""
        mask_BT = features["attention_mask"]
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        hidden_BTD = self.encoder(
            input_ids=features["input_ids"], attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        K, T = self.num_tokens, mask_BT.shape[1]
        last_B1 = (mask_BT * torch.arange(T, device=mask_BT.device)).argmax(dim=1, keepdim=True)
        index_BK = last_B1 + torch.arange(1 - K, 1, device=mask_BT.device)
        hidden_BKD = hidden_BTD.take_along_dim(index_BK[..., None], dim=1).to(self.reconstruction.weight.dtype)
        soft_prompts_BKD = self.reconstruction(hidden_BKD)
        features["sentence_embedding"] = self.alignment(soft_prompts_BKD).mean(dim=1)
        return features

    def get_embedding_dimension(self) -> int:
        """Returns the embedding size E."""
        return self.alignment.out_features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copies the model directory, unless output_path is that directory, and writes max_seq_length."""
        if Path(output_path).resolve() != self.folder.resolve():
            # sentence-transformers writes these itself.
            ignore = shutil.ignore_patterns(*OTHER_WRITERS)
            shutil.copytree(self.folder, output_path, ignore=ignore, dirs_exist_ok=True)
        self.save_config(output_path)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", model_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> "LLM2VecGenModule":
        """Loads a local model directory or a hub repository. model_kwargs: arguments of AutoModel.from_pretrained."""
        access = {"token": options.get("token"), "local_files_only": options.get("local_files_only", False)}
        cache, revision = options.get("cache_folder"), options.get("revision")
        folder = cls.load_dir_path(model_name_or_path, subfolder, cache_folder=cache, revision=revision, **access)
        backbone_options = {**access, "cache_dir": cache, **(model_kwargs or {})}  # `revision` is not the backbone's
        return cls(folder, backbone_options, **cls.load_config(folder))
