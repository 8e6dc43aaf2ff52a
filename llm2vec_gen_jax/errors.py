"""The one exception for input that a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the file, line or key, and the fix. Commands print it and exit with 2."""


def not_finite(what: str, dtype: str) -> InputError:
    """Returns the error for `what`, of which a backbone in `dtype` computes NaN or infinity."""
    if dtype == "float32":
        return InputError(f"{what}: gives NaN or infinity in float32. Check the backbone and the trained weights")
    others = "bfloat16 or float32" if dtype == "float16" else "float32"
    return InputError(f"{what}: its numbers exceed {dtype} (NaN or infinity). Load the backbone in {others} (dtype=)")


def quote(text: str, length: int = 40) -> str:
    """Returns a text in quotes, on one line, cut to `length` characters."""
    return repr(text if len(text) <= length else text[:length] + "…")


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the closest of `words`, or the list of them when none is close."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(words))}"
