"""A sentence-transformers module: `SentenceTransformer(modules=[LLM2VecGenModule(model)])`.

See https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import pathlib
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.data.buckets import pad

_BATCH_SIZE = 32  # as the default of LLM2VecGen.encode


class LLM2VecGenModule(InputModule):
    """Tokenizer and encoder of an LLM2VecGen. JAX computes on its own devices; there are no PyTorch parameters."""

    save_in_root = False

    def __init__(self, model: LLM2VecGen) -> None:
        super().__init__()
        self.model = model

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts with a trailing space, which sentence-transformers does not insert."""
        return {name: f"{text} " if text else "" for name, text in self.model.prompts.items()}

    @property
    def max_seq_length(self) -> int:
        """Tokens per text, including the compression tokens."""
        return self.model.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.model.max_seq_length = value

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the backbone."""
        return self.model.backbone.tokenizer.hf

    def get_embedding_dimension(self) -> int:
        """Returns the embedding size E."""
        return self.model.get_embedding_dimension()

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Returns right-padded input_ids and attention_mask (B, T) of the texts, without the compression tokens."""
        ids = self.model.tokenize([f"{prompt or ''}{text}" for text in inputs])
        lengths_B = torch.tensor([len(row) for row in ids])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        return {"input_ids": torch.from_numpy(pad(ids, mask_BT.shape[1])), "attention_mask": mask_BT.int()}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds sentence_embedding (B, E), float32, on the device of the ids."""
        ids_BT, lengths_B = features["input_ids"], features["attention_mask"].sum(dim=1).tolist()
        ids = [row[:length] for row, length in zip(ids_BT.numpy(force=True), lengths_B)]
        bar = progress.bar(len(ids), "text", "encode", enabled=False)
        [(_, embeddings_BE, _)] = self.model.encode_windows([(0, ids)], _BATCH_SIZE, False, bar)
        features["sentence_embedding"] = torch.from_numpy(embeddings_BE).to(ids_BT.device)
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes a model directory to the module's folder."""
        self.model.save_pretrained(pathlib.Path(output_path) / "model")

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> "LLM2VecGenModule":
        """Loads a module written by `save`, if sentence-transformers is told to trust the code of the folder."""
        hub: dict[str, Any] = {
            "token": options.get("token"),
            "local_files_only": bool(options.get("local_files_only")),
        }
        cache, revision = options.get("cache_folder"), options.get("revision")
        folder = cls.load_dir_path(model_name_or_path, subfolder, **hub, cache_folder=cache, revision=revision)
        return cls(LLM2VecGen.from_pretrained(pathlib.Path(folder) / "model", cache_dir=cache, **hub))
