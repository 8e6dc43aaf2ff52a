"""Training records in the form of evaluation: an instruction before an unlabeled text, with the text as its response.

The alignment target of such a record is the teacher's vector of the text itself, as in the published repeat loss, which
adds such a text to every record of a batch (`loss.repeat`).
"""

import pathlib
import random
import re
from collections.abc import Collection, Iterator

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import InstructConfig, ShardConfig, options
from llm2vec_gen_jax.data.instructions import instructed
from llm2vec_gen_jax.data.texts import Corpus, comparison_key, read_instructions
from llm2vec_gen_jax.inference.respond import shard_path

_MIN_WORDS = {"text": 1, "passage": 8, "sentence": 4}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ROWS = 1000  # records per write


def instruct(config: InstructConfig, excluded: Collection[str] = ()) -> pathlib.Path:
    """Writes the records {id, question, answer} of an InstructConfig. Returns the output path.

    excluded: comparison keys of texts to leave out. Record i depends on the input and the settings only; an interrupted
    run is completed. Raises InputError for invalid settings, and if the input has no usable text.
    """
    options.require(config)
    instructions = _instructions(config)
    path = shard_path(str(config.output), ShardConfig())
    with locks.locked(path, "output"):
        corpus = Corpus(str(config.input), config.field)
        if corpus.streamed:
            raise InputError("input=-: the texts are shuffled, so they must be in a file")
        run = {"command": "instruct", "input": list(corpus.identity()["sha256"].values()), "instructions": instructions}
        run |= {name: getattr(config, name) for name in ("field", "unit", "max_words", "count", "seed")}
        run["excluded"] = fingerprint(sorted(excluded))
        records = [
            {"id": number, "question": instructed(instructions, number, text), "answer": text}
            for number, text in enumerate(_texts(corpus, config, excluded))
        ]
        with JsonlAppender(path, run, config.overwrite) as output:
            for start in range(len(output.rows), len(records), _ROWS):
                output.append(records[start : start + _ROWS])
    return path


def _instructions(config: InstructConfig) -> list[str]:
    if not config.instructions:
        return [config.instruction.strip()]
    if config.instruction:
        raise InputError("instruction and instructions: pass only one of them")
    return read_instructions(config.instructions, "instructions")


def _texts(corpus: Corpus, config: InstructConfig, excluded: Collection[str]) -> list[str]:
    """Returns the distinct texts in random order."""
    texts: dict[str, str] = {}
    for row in corpus.read():
        if comparison_key(row.text) in excluded:
            continue
        for text in _units(row.text, config.unit):
            words = text.split()
            if len(words) < _MIN_WORDS[config.unit] or comparison_key(text) in excluded:  # before the text is cut
                continue
            text = text if len(words) <= config.max_words else " ".join(words[: config.max_words])
            texts.setdefault(comparison_key(text), text)
    usable = list(texts.values())
    if len(usable) < (config.count or 1):
        raise InputError(
            f"input={config.input}: {len(usable)} distinct texts of at least {_MIN_WORDS[config.unit]} words "
            f"(unit={config.unit}), count={config.count or 1} needed"
        )
    random.Random(config.seed).shuffle(usable)
    return usable[: config.count]


def _units(text: str, unit: str) -> Iterator[str]:
    """Yields a text, its longest line, or the sentences of its longest line."""
    if unit == "text":
        yield text.strip()
        return
    passage = max((part.strip() for part in text.splitlines()), key=len, default="")
    yield from [passage] if unit == "passage" else map(str.strip, _SENTENCE_END.split(passage))
