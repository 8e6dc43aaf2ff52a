"""An embedder for LlamaIndex: `LLM2VecGenEmbedding(model)` wherever an `embed_model` goes.

What that is: https://developers.llamaindex.ai/python/framework/module_guides/models/embeddings
"""

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr


class LLM2VecGenEmbedding(BaseEmbedding):
    """Vectors of an LLM2VecGen, as lists: queries and texts with its prompts for queries and documents, if any.

    options: of LLM2VecGen.encode_query and encode_document, such as truncate_dim and normalize_embeddings.
    embed_batch_size: texts of a call; short ones share rows, so it may be large.
    """

    _model: Any = PrivateAttr()
    _options: dict = PrivateAttr()

    def __init__(self, model, options=None, model_name="llm2vec-gen", embed_batch_size=256, **fields):
        super().__init__(model_name=model_name, embed_batch_size=embed_batch_size, **fields)
        self._model, self._options = model, options or {}

    @classmethod
    def class_name(cls):
        return "LLM2VecGenEmbedding"

    def _get_query_embedding(self, query):
        return self._model.encode_query(query, **self._options).tolist()

    def _get_text_embedding(self, text):
        return self._model.encode_document(text, **self._options).tolist()

    def _get_text_embeddings(self, texts):
        return self._model.encode_document(texts, **self._options).tolist()

    async def _aget_query_embedding(self, query):
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text):
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts):
        return await asyncio.to_thread(self._get_text_embeddings, texts)
