"""The one exception for input that a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the file, line or key, and the fix. Commands print it and exit with 2."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the closest of `words`, or the list of them when none is close."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(words))}"
