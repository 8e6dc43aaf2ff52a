"""The published package's collator, for scripts that run in its environment."""

import importlib.util
import sys
import types

if importlib.util.find_spec("datasets") is None:
    # The collator's package also imports `datasets`, for a Hub loader that is not used here. The stand-in
    # goes away again, because other libraries ask whether `datasets` is there.
    sys.modules["datasets"] = types.SimpleNamespace(Dataset=None, load_dataset=None)
    from llm2vec_gen.dataset import CustomCollator, DataSample

    del sys.modules["datasets"]
else:
    from llm2vec_gen.dataset import CustomCollator, DataSample

__all__ = ["CustomCollator", "DataSample"]
