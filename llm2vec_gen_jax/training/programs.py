"""Ahead-of-time compilation of jitted functions."""

from typing import Any

import jax


class CompiledCache:
    """A jitted function and its compiled programs by argument shapes.

    A call with other shapes compiles as jax.jit does.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self.compiled: dict[tuple[Any, ...], jax.stages.Compiled] = {}

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """Compiles for arguments (arrays or ShapeDtypeStructs with shardings). Returns the compiled program."""
        key = _shapes(arguments)
        if key not in self.compiled:
            self.compiled[key] = self.jitted.lower(*arguments).compile()
        return self.compiled[key]

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled.get(_shapes(arguments), self.jitted)(*arguments)


def _shapes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
