"""Instructions before a text, the form of evaluation: for the records of `instruct` and for the repeat loss."""

from collections.abc import Sequence

REPEAT = "Repeat this text word by word."  # of the published repeat loss


def instructed(instructions: Sequence[str], number: int, text: str) -> str:
    """Returns a text after one of the instructions, which are used in turn. number: of the text, from 0."""
    return f"{instructions[number % len(instructions)]} {text}".strip()
