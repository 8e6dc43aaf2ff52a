"""The exception for invalid input, and the parts of its messages."""

import difflib
import itertools
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message
_LONGEST_WORD, _MOST_WORDS = 100, 1000  # limits of `nearest`, because the words may come from a hostile file


class InputError(ValueError):
    """Invalid input: the message names the file, line or key, and the fix. Commands print it and exit with 2.

    The message is a single line: see `one_line`.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Returns the text without line breaks and control characters; the middle of a long text is omitted."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1] for char in text)


def first_line(error: BaseException, longest: int = 300) -> str:
    """Returns the first line of an exception's message, or the name of its type if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest].rstrip(".")


def quote(text: str, length: int = 40) -> str:
    """Returns the repr of a text, truncated to `length` characters."""
    return repr(text if len(text) <= length else text[:length] + "…")


def not_finite(what: str, dtype: str) -> InputError:
    """Returns the error for an input `what` for which a backbone in `dtype` computes NaN or infinity."""
    if dtype == "float32":
        return InputError(f"{what}: gives NaN or infinity in float32. Check the backbone and the trained weights")
    others = "bfloat16 or float32" if dtype == "float16" else "float32"
    return InputError(f"{what}: its values exceed {dtype} (NaN or infinity). Load the backbone in {others} (dtype=)")


def nearest(word: str, words: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the closest of `words`, or the list of them if none is close."""
    known = [known[:_LONGEST_WORD] for known in itertools.islice(words, _MOST_WORDS)]
    close = difflib.get_close_matches(word[:_LONGEST_WORD], known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
