"""LLM2Vec-Gen in JAX: text embeddings that encode the answer an LLM would give (arXiv 2603.10913)."""

import os
from typing import TYPE_CHECKING, Any

try:
    import fcntl  # noqa: F401
except ModuleNotFoundError:
    raise ImportError("llm2vec_gen_jax needs Linux or macOS (POSIX file locks): on Windows, run it in WSL") from None

if TYPE_CHECKING:  # at run time __getattr__ imports these
    from llm2vec_gen_jax.api import LLM2VecGen
    from llm2vec_gen_jax.common.errors import InputError
    from llm2vec_gen_jax.inference.shards import load_embeddings

# Before transformers is imported: suppresses its warning that PyTorch is missing, which is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["LLM2VecGen", "InputError", "load_embeddings"]


def __getattr__(name: str) -> Any:
    # Lazy: importing the package must not initialize JAX, which the commands configure first.
    if name == "LLM2VecGen":
        from llm2vec_gen_jax.api import LLM2VecGen

        return LLM2VecGen
    if name == "InputError":
        from llm2vec_gen_jax.common.errors import InputError

        return InputError
    if name == "load_embeddings":
        from llm2vec_gen_jax.inference.shards import load_embeddings

        return load_embeddings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
