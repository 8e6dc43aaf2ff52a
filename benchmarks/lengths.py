"""Text lengths for benchmarks, in tokens: of real queries from a file, otherwise from a similar distribution."""

import dataclasses
import os

import numpy as np

QUERY_LIMIT, ANSWER_LIMIT = 502, 512  # queries of 512 tokens with the 10 compression tokens


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """Integer lengths with a log-normal distribution, clipped to [least, most]."""

    mean_of_log: float
    deviation: float
    least: int
    most: int

    def sample(self, random: np.random.Generator, count: int) -> np.ndarray:
        lengths = np.rint(random.lognormal(self.mean_of_log, self.deviation, count))
        return np.clip(lengths, self.least, self.most).astype(int)

    def __str__(self):
        return f"log-normal ({self.mean_of_log}, {self.deviation}) clipped to {self.least}..{self.most}"


# 76,197 public queries and instructions in SmolLM2's tokens: mean 48.6, median 16, logarithms 3.24 +- 1.11, 4 to 502.
QUERIES = LogNormal(3.29, 1.11, 4, QUERY_LIMIT)  # mean 48.6
ANSWERS = LogNormal(5.631, 0.6, 32, ANSWER_LIMIT)  # mean 300
PASSAGES = LogNormal(5.631, 0.6, 32, QUERY_LIMIT)  # mean 298
PASSAGE_SHARE = 1 / 3  # of the texts of a mixed corpus; the others are queries


def queries(
    random: np.random.Generator, count: int, path: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, str]:
    """Returns (lengths of queries, description of their source).

    path: a .jsonl[.gz] with `question` keys; `count` are sampled and tokenized with the default backbone's tokenizer.
    """
    if not path:
        return QUERIES.sample(random, count), f"queries {QUERIES}"
    from llm2vec_gen_jax.data.texts import read_texts
    from llm2vec_gen_jax.pretrained.backbone import open_checkpoint

    texts = read_texts(path, "question")
    drawn = [texts[row].strip() for row in random.choice(len(texts), count, replace=count > len(texts))]
    ids = open_checkpoint("smollm2-135m", None)[0].tokenizer.encode(drawn, QUERY_LIMIT)
    return np.array([max(len(row), 1) for row in ids]), f"queries drawn from {len(texts):,} real ones"


def mixed(
    random: np.random.Generator, count: int, path: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, str]:
    """Returns (lengths of a corpus of queries and passages, description of their source)."""
    lengths, where = queries(random, count, path)
    passages = random.random(count) < PASSAGE_SHARE
    lengths[passages] = PASSAGES.sample(random, passages.sum())
    return lengths, f"{where}; a third of the texts passages, {PASSAGES}"
