"""Jitted functions whose programs are compiled before they are needed."""

import jax


class CompiledCache:
    """A jitted function and its programs by the shapes of its arguments.

    What was not compiled ahead is compiled when it is called, as by jax.jit alone.
    """

    def __init__(self, jitted):
        self.jitted, self.compiled = jitted, {}

    def compile(self, *arguments):
        """Compiles for arguments (arrays or ShapeDtypeStructs with shardings). Returns the compiled program."""
        key = _shapes(arguments)
        if key not in self.compiled:
            self.compiled[key] = self.jitted.lower(*arguments).compile()
        return self.compiled[key]

    def __call__(self, *arguments):
        return self.compiled.get(_shapes(arguments), self.jitted)(*arguments)


def _shapes(arguments):
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
