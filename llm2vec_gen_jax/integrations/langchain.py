"""An embedder for LangChain: `LLM2VecGenEmbeddings(model)` wherever an `Embeddings` goes.

What that is: https://docs.langchain.com/oss/python/integrations/embeddings
"""

from langchain_core.embeddings import Embeddings


class LLM2VecGenEmbeddings(Embeddings):
    """Vectors of an LLM2VecGen, as lists. The asynchronous methods are LangChain's own: these in a thread.

    options: of LLM2VecGen.encode_query and encode_document, such as batch_size, truncate_dim, normalize_embeddings.
    """

    def __init__(self, model, **options):
        self.model, self.options = model, options

    def embed_documents(self, texts):
        """Returns a list of E numbers for each text, with the model's prompt for documents, if it has one."""
        return self.model.encode_document(list(texts), **self.options).tolist()

    def embed_query(self, text):
        """Returns the E numbers of a text, with the model's prompt for queries, if it has one."""
        return self.model.encode_query(text, **self.options).tolist()
