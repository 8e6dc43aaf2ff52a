"""LlamaIndex embeddings: `embed_model=LLM2VecGenEmbedding(model)`.

See https://developers.llamaindex.ai/python/framework/module_guides/models/embeddings
"""

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from llm2vec_gen_jax.api import LLM2VecGen


class LLM2VecGenEmbedding(BaseEmbedding):
    """Embeddings of an LLM2VecGen as lists, with the model's query and document prompts, if any.

    options: for LLM2VecGen.encode_query and encode_document, for example truncate_dim and normalize_embeddings.
    embed_batch_size: texts per call; it can be large, because short texts are packed into shared rows.
    """

    _model: Any = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()

    def __init__(
        self,
        model: LLM2VecGen,
        options: dict[str, Any] | None = None,
        model_name: str = "llm2vec-gen",
        embed_batch_size: int = 256,
        **fields: Any,
    ) -> None:
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **fields)
        self._model, self._options = model, options or {}

    @classmethod
    def class_name(cls) -> str:
        return "LLM2VecGenEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.encode_query(query, **self._options).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.encode_document(text, **self._options).tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode_document(texts, **self._options).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
