"""LLM2Vec-Gen in JAX: text embeddings that encode the answer an LLM would give (arXiv 2603.10913)."""

import importlib
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
    from llm2vec_gen_jax.training.loop import TrainingCallback
    from llm2vec_gen_jax.training.trainer import LLM2VecGenTrainer

# Before transformers is imported: suppresses its warning that PyTorch is missing, which is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["InputError", "LLM2VecGen", "LLM2VecGenTrainer", "TrainingCallback", "load_embeddings"]
_MODULES = {
    "InputError": "common.errors",
    "LLM2VecGen": "api",
    "LLM2VecGenTrainer": "training.trainer",
    "TrainingCallback": "training.loop",
    "load_embeddings": "inference.shards",
}


def __getattr__(name: str) -> Any:
    # Lazy: importing the package must not initialize JAX, which the commands configure first.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
