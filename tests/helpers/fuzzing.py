"""Hostile input and what may come of it: what is not refused as bad input is read, and nothing else ever happens.

A few examples each; LLM2VEC_GEN_FUZZ=5000 tries as many of each (hours).
"""

import contextlib
import copy
import json
import os
import re

import hypothesis
from hypothesis import strategies as st

from llm2vec_gen_jax.common.errors import InputError

FUZZ = hypothesis.settings(
    max_examples=int(os.environ.get("LLM2VEC_GEN_FUZZ", "20")),
    suppress_health_check=list(hypothesis.HealthCheck),
    deadline=None,
)
NUMBERS = st.integers() | st.integers(-3, 300) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=6) | st.just("\ud800")
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@st.composite
def altered(draw, value, words=()):
    """A copy of a JSON value with one part of it replaced, taken out, or added. words: keys and texts worth trying."""
    other = JSON | st.sampled_from(words) if words else JSON
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(other)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    how = draw(st.integers(0, 9))
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[draw(st.text(max_size=6) | st.sampled_from([*words, "x"]))] = value.pop(key)
    elif how == 2 and isinstance(value, list):
        value.append(draw(other))
    else:
        value[key] = draw(altered(value[key], words))
    return value


@st.composite
def damaged(draw, content):
    """Bytes with a few pieces of them overwritten, cut out, repeated or put in, most near the start."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        piece = draw(st.binary(max_size=9) | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")))
        length = draw(st.sampled_from([0, len(piece), 1, len(content)]))
        content[place : place + length] = piece
    return bytes(content)


ALIASES = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c, *%c]\n" % (n + 1, n + 1, n, n, n) for n in range(97, 120))
HUGE = [number.to_bytes(8, order) for number in (2**31, 2**40, 2**62, 2**64 - 1) for order in ("little", "big")]
PIECES = [
    b"[" * 5000,
    b"{a: " * 3000,
    b"9" * 5000,
    "²".encode(),
    b"1e999",
    b"-1",
    b"18446744073709551616",
    b"2024-02-30",
]
PIECES += [
    ALIASES,
    b"\0",
    b"\xff",
    b"\\ud800",
    b"x" * 300_000,
    b"{{",
    b"&a [*a]",
    b"*a",
    b"<<: ",
    b"!!python/name:os",
    *HUGE,
]
PIECES += [b"null", b"true", b'""', b"[]", b"{}", b"../../x", b"(a+)+$", b"%s%n" * 9, b"\x1b[2J"]
_SPOTS = re.compile(rb"[-+.\w]+|\"[^\"\n]*\"|[\[{][^\[{\]}]*[\]}]")


def hostile(random, content):
    """Returns a file's bytes as an attacker alters them: a value, a word or a number in place of another."""
    content = bytes(content)
    for _ in range(random.choice([1, 1, 2])):
        spots = [match.span() for match in _SPOTS.finditer(content[:20_000])]
        if spots and random.random() < 0.6:
            start, end = random.choice(spots)
        else:
            start = random.randrange(min(len(content), random.choice([64, 400, 10**9])) or 1)
            end = start + random.choice([0, 1, 4, 8, 8, 8, len(content)])
        piece = random.choice(PIECES + [random.randbytes(random.randrange(9)), content[start : start + 200] * 50])
        content = content[:start] + piece + content[end:]
    return content


def dumped(value):
    """JSON as bytes, lone surrogates too."""
    return json.dumps(value, ensure_ascii=True).encode()


@contextlib.contextmanager
def contained(folder):
    """No file outside of `folder`, which lies in a folder of its own, is made, changed or removed by the block."""

    def outside():
        paths = [path for path in folder.parent.rglob("*") if not path.is_relative_to(folder)]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = outside()
    yield
    assert outside() == before


def refused_or(read, *arguments, **more):
    """What read(...) returns, or None where it refuses its input. Anything else that it raises is a failure."""
    try:
        return read(*arguments, **more)
    except InputError as error:
        assert str(error)  # lone surrogates may be in it: the standard error stream escapes them
        return None
