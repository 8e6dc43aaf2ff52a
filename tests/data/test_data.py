"""Records in every format, tokenized examples, the plan of batches, and the batches."""

import gzip
import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax.common import jsonl
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import DataConfig
from llm2vec_gen_jax.data import buckets, records, texts
from llm2vec_gen_jax.data.batches import Batches, BatchSchedule, count_tokens, iterate
from llm2vec_gen_jax.data.examples import Examples, tokenize
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer
from tests.conftest import TMP_PATH, tiny_tokenizer, write_jsonl
from tests.helpers.table_files import SUFFIXES, write_table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=6)


# Records


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"question": "a", "answer": "b"', r"line 3: not valid JSON"),
        (b'{"question": "a", "answer": "\xff"}', r"line 3: not UTF-8 \(byte \d+ is 0xff\)"),
        (b'\xff\xfe{"question"', r"line 3: not UTF-8"),
        (b'{"question": "a", "anwser": "b"}', r"line 3: no column 'answer', did you mean 'anwser'\?"),
        (b'{"prompt": "a", "answer": "b"}', r"line 3: no column 'question'"),
        (b"{}", r"line 3: no column 'question'"),
        (b'{"question": null, "answer": "b"}', r"line 3: 'question' must be a string, found NoneType"),
        (b'{"question": "a", "answer": ["b"]}', r"line 3: 'answer' must be a string, found list"),
        (b'{"question": "a", "answer": "\\ud800"}', r"line 3: 'answer' has an unpaired surrogate"),
        (b'{"question": "a", "answer": "b", "id": "\\udc00"}', r"line 3: 'id' has an unpaired surrogate"),
        (b'{"question": "a", "answer": "b", "id": {"a": 1}}', r"line 3: 'id' must be"),
        (b'[{"question": "a", "answer": "b"}]', r"line 3: expected a JSON object, found list"),
        (b'"text"', r"line 3: expected a JSON object, found str"),
        (b"plain text", r"line 3: not valid JSON"),
        (b'{"question": ' + b"[" * 100_000, r"line 3: not readable JSON"),
        (b'{"question": ' + b"1" * 10_000 + b"}", r"line 3: not readable JSON"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(tmp_path, line, expected, packed):
    lines = b'{"question": "a", "answer": "b"}\n\n' + line + b"\n"
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
    with pytest.raises(InputError, match=f"{path}, {expected}"):
        records.read_records(path, ("question", "answer"))


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: no rows"):
        records.read_records(path, ("question",))


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "none.json", "."])
def test_a_missing_file_is_named(tmp_path, name):
    message = r"not a readable file \(Is a directory\)" if name == "." else "no such file"
    with pytest.raises(InputError, match=f"{tmp_path / name}: {message}"):
        records.read_records(tmp_path / name, ("question",))


def test_a_byte_order_mark_crlf_and_empty_lines_are_accepted(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = '\ufeff{"question": "é", "id": "x", "more": 1}\r\n\r\n  \n{"question": "b\\r\\n\u2028c"}'
    path.write_bytes(rows.encode())
    expected = [{"question": "é", "id": "x"}, {"question": "b\r\n\u2028c"}]
    assert records.read_records(path, ("question",)) == expected
    assert records.read_records(path, ("question",), limit=1) == expected[:1]


@hypothesis.given(OBJECTS, st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans(), st.booleans(), st.booleans())
@TMP_PATH
def test_jsonl_reads_what_was_written(tmp_path, rows, newline, packed, marked, ended):
    text = newline.join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = ("\ufeff" * marked + text + newline * ended).encode("utf-8", "surrogatepass")
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [row for _, row in jsonl.read_jsonl(path)] == rows


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"question": f"{number} é"} for number in range(30)]
    whole = gzip.compress(write_jsonl(tmp_path / "rows.jsonl", rows).read_bytes(), mtime=0)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=str(path)):
            records.read_records(path, ("question",))
    refused = 0
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert records.read_records(path, ("question",)) == rows  # a flip in the header's comment fields
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.7 * len(whole) * 8


def test_texts_of_a_txt_file_are_its_lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\r\n\n  three é\u2028 \n".encode())
    assert texts.read_texts(path, "text") == ["one", "", "  three é\u2028 "]
    assert texts.read_texts(write_jsonl(tmp_path / "texts.jsonl", [{"body": "x"}]), "body") == ["x"]
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="empty.txt: no lines"):
        texts.read_texts(tmp_path / "empty.txt", "text")


# Formats


QUESTIONS = ["What, exactly?", 'A "quote"', "two\nlines", " é\r\n\u2028 ", "x" * 200_000]


def test_every_format_gives_the_same_records(tmp_path):
    rows = [{"more": "m", "question": text, "answer": text[::-1], "id": f"n{n}"} for n, text in enumerate(QUESTIONS)]
    expected = [{"id": row["id"], "question": row["question"], "answer": row["answer"]} for row in rows]
    for suffix in SUFFIXES:
        path = write_table(tmp_path / f"table{suffix}", rows)
        assert records.read_records(path, ("question", "answer")) == expected, path
        assert records.read_records(path, ("question", "answer"), limit=3) == expected[:3]
        assert texts.read_texts(path, "question") == QUESTIONS
        assert [row.text for row in texts.Corpus(str(path), "question", "id").read()] == QUESTIONS


def test_every_line_of_a_txt_file_is_a_record_of_one_column(tmp_path):
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(b"one\n\n  \ntwo, three\n"))
        assert records.read_records(path, ("question",)) == [{"question": "one"}, {"question": "two, three"}]
        with pytest.raises(InputError, match=f"{path}: plain text has no column 'answer'. Use JSONL, CSV or Parquet"):
            records.read_records(path, ("question", "answer"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path, suffix):
    for names, message in (
        (("id", "prompt"), "no column 'question'; known: id, prompt"),
        (("id", "questions"), r"no column 'question', did you mean 'questions'\? \(columns: id, questions\)"),
    ):
        path = write_table(tmp_path / f"a{suffix}", [dict.fromkeys(names, "x")])
        place = f"{path}, line 1" if suffix == ".jsonl" else path
        with pytest.raises(InputError, match=f"{place}: {message}"):
            records.read_records(path, ("question",))
        with pytest.raises(InputError, match=f"{place}: {message}. Set field="):
            texts.read_texts(path, "question")
        path.unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("question\n", "no rows"),
        ("question,id\na,1\n\nb\n", "line 4: 1 fields, the header has 2"),
        ('question\n"a\nb"\n"c"d\n', "line 4: not valid CSV"),
        ('question\na\n"b\nc\n', "line 3: not valid CSV"),
        ("question,question\na,b\n", "two columns are called 'question'"),
        (b"question\na\ncaf\xe9\n", "line 3: not UTF-8"),
        ("question\ra\r", "not valid CSV"),
        ("question;id\na;1\n", r"no column 'question', did you mean 'question;id'\?"),
    ],
)
def test_an_invalid_csv_file_is_named(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"{path}.*{message}"):
        records.read_records(path, ("question",))


# Examples


def test_tokenize_strips_cuts_and_drops_empty_answers():
    tokenizer = Tokenizer(tiny_tokenizer())
    records = [
        {"question": "  q0 ", "answer": " a0\n"},
        {"question": "q1", "answer": " \t\n"},
        {"question": "q2" * 20, "answer": "a2" * 20},
        {"question": " ", "answer": "a3"},
        {"question": "q4", "answer": ""},
        {"question": "q5", "answer": "a5"},
    ]
    settings = DataConfig(max_query_length=14, max_answer_length=9)
    examples = tokenize(records, tokenizer, settings, num_appended=4)
    assert examples.row.tolist() == [0, 2, 3, 5]
    text = [tokenizer.decode(ids) for ids in examples.query]
    assert text == ["q0", "q2q2q2q2q2", "", "q5"]  # 10 = 14 - 4 tokens, one per byte
    assert [tokenizer.decode(ids) for ids in examples.answer] == ["a0", "a2a2a2a2a", "a3", "a5"]
    assert [len(ids) for ids in examples.answer] == [3, 9, 3, 3]  # the end token, cut off the long one
    assert {ids.dtype for ids in (*examples.query, *examples.answer)} == {np.dtype(np.int32)}


def test_tokenize_refuses_lengths_without_room_and_empty_data():
    tokenizer = Tokenizer(tiny_tokenizer())
    with pytest.raises(InputError, match="data.max_query_length=4 must exceed the 4 appended tokens"):
        tokenize([{"question": "q", "answer": "a"}], tokenizer, DataConfig(max_query_length=4), 4)
    with pytest.raises(InputError, match="rows.jsonl: every answer is empty"):
        tokenize([{"question": "q", "answer": " "}], tokenizer, DataConfig(responses="rows.jsonl"), 4)
    cut = [{"question": "q", "answer": "a", "finish": finish} for finish in ("length", "stop", "length")]
    settings = DataConfig(responses="rows.jsonl", finished_only=True)
    assert tokenize(cut, tokenizer, settings, 4).row.tolist() == [1]
    with pytest.raises(InputError, match="rows.jsonl: every answer is empty or truncated"):
        tokenize(cut[:1], tokenizer, settings, 4)


def test_the_digest_tells_apart_what_trains_differently():
    def examples(query=((1, 2), (3,)), answer=((4,), (5, 6)), target=((0.0,), (1.0,))):
        arrays = [[np.array(ids, np.int32) for ids in part] for part in (query, answer)]
        return Examples(*arrays, np.arange(2), np.array(target, np.float32))

    variants = [
        examples(),
        examples(query=((1,), (2, 3))),  # the same ids, cut elsewhere
        examples(answer=((4,), (5, 7))),
        examples(target=((0.0,), (1.5,))),
    ]
    assert len({variant.digest for variant in variants}) == len(variants)
    assert examples().digest == examples().digest


# The plan


LENGTHS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 90)), min_size=8, max_size=80)
PLANS = st.tuples(LENGTHS, st.integers(1, 8), st.integers(1, 5), st.booleans(), st.integers(0, 2**40))


def make_plan(drawn):
    lengths, batch_size, buckets, shuffle, seed = drawn
    query, answer = zip(*lengths)
    return BatchSchedule(list(query), list(answer), batch_size, buckets, shuffle, seed), np.array(lengths)


def make_examples(lengths, width=3):
    random = np.random.default_rng(0)
    query, answer = ([random.integers(1, 99, n).astype(np.int32) for n in column] for column in lengths.T)
    target = random.normal(size=(len(lengths), width)).astype(np.float32)
    return Examples(query, answer, np.arange(len(lengths)), target)


def realistic_epoch(count, batch_size, max_buckets):
    """(plan, real tokens, computed tokens) of an epoch of lognormal lengths like those of chat data."""
    random = np.random.default_rng(0)
    query = np.clip(random.lognormal(4.2, 1.1, count), 1, 502).astype(int)
    answer = np.clip(random.lognormal(5.3, 0.8, count), 2, 512).astype(int)
    plan = BatchSchedule(query, answer, batch_size, max_buckets, True, 0)
    batches = [plan[step] for step in range(plan.batches_per_epoch)]
    real = sum(int(query[batch.rows].sum() + answer[batch.rows].sum()) for batch in batches)
    return plan, real, sum(batch_size * (batch.T + batch.S) for batch in batches)


@hypothesis.given(PLANS)
def test_an_epoch_holds_every_example_at_most_once_and_leaves_out_the_remainder(drawn):
    plan, lengths = make_plan(drawn)
    size = drawn[1]
    for epoch in range(3):
        batches = [plan[epoch * plan.batches_per_epoch + index] for index in range(plan.batches_per_epoch)]
        rows = np.concatenate([batch.rows for batch in batches])
        assert all(len(batch.rows) == size for batch in batches)
        assert len(set(rows.tolist())) == len(rows) == len(lengths) - len(lengths) % size


@hypothesis.given(PLANS)
def test_a_batch_is_padded_to_the_least_shapes_that_hold_it(drawn):
    plan, lengths = make_plan(drawn)
    for step in range(2 * plan.batches_per_epoch):
        batch = plan[step]
        query, answer = lengths[batch.rows].max(axis=0)
        assert batch.T == min(edge for edge in plan.query_edges if edge >= query)
        assert batch.S == min(edge for edge in plan.answer_edges if edge >= answer)
    assert max(len(plan.query_edges), len(plan.answer_edges)) <= drawn[2]


@hypothesis.given(PLANS, st.randoms(use_true_random=False))
def test_a_batch_is_a_function_of_its_step(drawn, random):
    plan, _ = make_plan(drawn)
    steps = [*range(3 * plan.batches_per_epoch), 1_000_003]
    first = {step: (plan[step].rows.tolist(), plan[step].T, plan[step].S) for step in steps}
    random.shuffle(steps)
    fresh, _ = make_plan(drawn)
    assert {step: (fresh[step].rows.tolist(), fresh[step].T, fresh[step].S) for step in steps} == first


@hypothesis.given(PLANS)
def test_epochs_differ_when_shuffled_and_repeat_when_not(drawn):
    plan, lengths = make_plan(drawn)
    n = plan.batches_per_epoch

    def epoch(number):
        return [plan[number * n + index].rows.tolist() for index in range(n)]

    if plan.shuffle:
        # Six epochs of a few examples may agree pairwise by chance, not all of them.
        assert any(epoch(number) != epoch(0) for number in range(1, 6)) or len(lengths) // drawn[1] == 1
    else:
        assert epoch(0) == epoch(1) == epoch(7)
        assert sum(epoch(0), []) == list(range(n * drawn[1]))


def test_seeds_give_other_orders_and_few_examples_are_an_error():
    lengths = [4] * 64
    orders = {tuple(BatchSchedule(lengths, lengths, 8, 2, True, seed)[0].rows.tolist()) for seed in range(5)}
    assert len(orders) == 5
    with pytest.raises(InputError, match="3 examples do not fill a batch of 4.*train.batch_size"):
        BatchSchedule([1] * 3, [1] * 3, 4, 2, True, 0)


def test_who_sits_out_changes_from_epoch_to_epoch():
    plan = BatchSchedule([4] * 11, [4] * 11, 4, 2, True, 0)
    out = set()
    for epoch in range(12):
        rows = np.concatenate([plan[epoch * 2 + index].rows for index in range(2)])
        out.add(tuple(sorted(set(range(11)) - set(rows.tolist()))))
    assert len(out) > 6


@hypothesis.given(st.lists(st.integers(0, 30)), st.integers(1, 8), st.integers(0, 5))
def test_length_sorted_batches_are_the_longest_first(lengths, batch_size, first):
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])[first:]
    found = [batch.tolist() for batch in buckets.length_sorted_batches(lengths, batch_size, first)]
    assert sum(found, []) == order
    assert all(len(batch) == batch_size for batch in found[:-1])


# Some lists of lengths that fewer edges than allowed serve well: in most, one edge more always helps.


LENGTH = [st.integers(0, 60), st.sampled_from([64, 63, 56]), st.sampled_from([16, 24, 55, 56])]


@hypothesis.given(st.one_of([st.lists(length, min_size=1, max_size=30) for length in LENGTH]), st.integers(1, 4))
def test_edges_are_optimal_and_as_few_as_keep_padding_low(lengths, count):
    waste = 0.05
    edges = buckets.choose_edges(lengths, count, waste)
    padded = np.array([buckets.round_up(length) for length in lengths])

    def total(chosen):
        return sum(min(edge for edge in chosen if edge >= length) for length in padded)

    inner = sorted(set(padded.tolist()) - {padded.max()})
    for size in range(1, count + 1):
        # Brute force: the longest length is always an edge, any others are free.
        choices = itertools.combinations(inner, min(size - 1, len(inner)))
        best = min(total([*choice, padded.max()]) for choice in choices)
        if best <= max(sum(lengths), 1) / (1 - waste) or size - 1 >= len(inner):
            break
    assert edges == sorted(set(edges)) and edges[-1] == padded.max()
    assert len(edges) <= size <= count
    assert total(edges) == best


@pytest.mark.parametrize("count, batch_size, extra", [(4096, 8, 0.02), (4096, 32, 0.05), (512, 8, 0.03)])
def test_padding_is_hardly_more_than_the_edges_cost(count, batch_size, extra):
    plan, real, computed = realistic_epoch(count, batch_size, DataConfig().max_buckets)
    query, answer = (np.array(edges) for edges in (plan.query_edges, plan.answer_edges))
    edges = query[plan.query_cell].sum() + answer[plan.answer_cell].sum()
    assert real / edges - real / computed < extra
    assert max(len(query), len(answer)) <= DataConfig().max_buckets


def test_padding_is_below_a_tenth_on_a_realistic_mixture():
    _, real, computed = realistic_epoch(4096, 8, 16)
    assert 1 - real / computed < 0.10
    _, real, computed = realistic_epoch(4096, 8, DataConfig().max_buckets)
    assert 1 - real / computed < 0.13


# Padded batches


@hypothesis.given(PLANS, st.integers(0, 30))
def test_the_rows_of_all_processes_are_the_rows_of_one(drawn, step):
    plan, lengths = make_plan(drawn)
    examples = make_examples(lengths)
    whole = Batches(examples, plan, 0, 1)[step]
    for processes in (number for number in (1, 2, 4, 8) if drawn[1] % number == 0):
        parts = [Batches(examples, plan, process, processes)[step] for process in range(processes)]
        for key, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)
    rows = plan[step].rows
    for number, row in enumerate(rows):
        n, m = lengths[row]
        assert (whole["query_lengths"][number], whole["answer_lengths"][number]) == (n, m)
        np.testing.assert_array_equal(whole["query"][number, :n], examples.query[row])
        np.testing.assert_array_equal(whole["answer"][number, :m], examples.answer[row])
        assert not whole["query"][number, n:].any() and not whole["answer"][number, m:].any()
        np.testing.assert_array_equal(whole["target"][number], examples.target[row])
    real, computed = count_tokens(whole)
    assert real == lengths[rows].sum()
    assert computed == len(rows) * (plan[step].T + plan[step].S)


def test_a_batch_that_does_not_divide_over_processes_is_an_error():
    plan, lengths = make_plan(([(3, 3)] * 12, 6, 1, True, 0))
    with pytest.raises(InputError, match="train.batch_size=6 is not divisible by 4 processes"):
        Batches(make_examples(lengths), plan, 0, 4)


def test_iterating_from_a_step_is_the_tail_of_all_batches():
    random = np.random.default_rng(1)
    lengths = random.integers(1, 60, (50, 2))
    plan = BatchSchedule(lengths[:, 0], lengths[:, 1], 4, 3, True, 0)
    batches = Batches(make_examples(lengths), plan, 0, 1)
    whole = [batches[step] for step in range(40)]
    for first in (0, 1, 11, 12, 13, 39, 40):
        tail = list(iterate(batches, first, 40))
        assert len(tail) == 40 - first
        for left, right in zip(tail, whole[first:]):
            for key, value in right.items():
                np.testing.assert_array_equal(left[key], value)
