"""LangChain embeddings: `LLM2VecGenEmbeddings(model)`.

See https://docs.langchain.com/oss/python/integrations/embeddings
"""

from typing import Any

from langchain_core.embeddings import Embeddings

from llm2vec_gen_jax.api import LLM2VecGen


class LLM2VecGenEmbeddings(Embeddings):
    """Embeddings of an LLM2VecGen as lists. The inherited asynchronous methods run the synchronous ones in a thread.

    options: for LLM2VecGen.encode_query and encode_document, for example truncate_dim and normalize_embeddings.
    """

    def __init__(self, model: LLM2VecGen, **options: Any) -> None:
        self.model, self.options = model, options

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns the embedding (E,) of each text, with the model's document prompt, if any."""
        return self.model.encode_document(list(texts), **self.options).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Returns the embedding (E,) of a text, with the model's query prompt, if any."""
        return self.model.encode_query(text, **self.options).tolist()
