"""Hides PyTorch from a process that has this folder in PYTHONPATH."""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Finds all modules but torch."""

    @classmethod
    def find_spec(cls, name, *more):
        return None if name == "torch" else super().find_spec(name, *more)


sys.meta_path = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
