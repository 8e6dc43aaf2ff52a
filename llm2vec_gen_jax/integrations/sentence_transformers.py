"""An embedder as a module of sentence-transformers: `SentenceTransformer(modules=[LLM2VecGenModule(model)])`.

What such a module is: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import pathlib

import torch
from sentence_transformers.base.modules import InputModule

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.data.batches import pad

_ROWS = 32  # of 256 tokens in a pass, as of LLM2VecGen.encode


class LLM2VecGenModule(InputModule):
    """Texts to ids to embeddings, which JAX computes on its own devices. PyTorch finds nothing in it to train.

    model: an LLM2VecGen.
    """

    save_in_root = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    @property
    def prompts(self):
        """The model's prompts as that library takes them: it puts no space between a prompt and a text."""
        return {name: f"{text} " if text else "" for name, text in self.model.prompts.items()}

    @property
    def max_seq_length(self):
        """Tokens of a text, the compression tokens included."""
        return self.model.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value):
        self.model.max_seq_length = value

    @property
    def tokenizer(self):
        """The backbone's, of transformers."""
        return self.model.backbone.tokenizer.hf

    def get_embedding_dimension(self):
        """Returns E."""
        return self.model.get_embedding_dimension()

    def preprocess(self, inputs, prompt=None, **_):
        """Returns input_ids and attention_mask (B, T) of B texts, right-padded, without the compression tokens."""
        ids = self.model.tokenize([f"{prompt or ''}{text}" for text in inputs])
        lengths_B = torch.tensor([len(row) for row in ids])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        return {"input_ids": torch.from_numpy(pad(ids, mask_BT.shape[1])), "attention_mask": mask_BT.int()}

    def forward(self, features, **_):
        """Adds sentence_embedding (B, E), float32, where the ids are."""
        ids_BT, lengths_B = features["input_ids"], features["attention_mask"].sum(dim=1).tolist()
        ids = [row[:length] for row, length in zip(ids_BT.numpy(force=True), lengths_B)]
        bar = progress.bar(len(ids), "text", "encode", enabled=False)
        [(_, embeddings_BE, _)] = self.model.encode_windows([(0, ids)], _ROWS, False, bar)
        features["sentence_embedding"] = torch.from_numpy(embeddings_BE).to(ids_BT.device)
        return features

    def save(self, output_path, *_, **__):
        """Writes a model directory into the module's own folder."""
        self.model.save_pretrained(pathlib.Path(output_path) / "model")

    @classmethod
    def load(cls, model_name_or_path, subfolder="", **options):
        """Reads what `save` wrote. That library asks to be told to trust a module that is not its own."""
        hub = {name: options.get(name) for name in ("token", "cache_folder", "revision")}
        folder = cls.load_dir_path(
            model_name_or_path, subfolder, **hub, local_files_only=options.get("local_files_only", False)
        )
        return cls(LLM2VecGen.from_pretrained(pathlib.Path(folder) / "model"))
