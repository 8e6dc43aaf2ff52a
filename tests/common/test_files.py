"""JSONL files that are appended to lose and repeat nothing; files appear whole; what differs is named."""

import hypothesis
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax.common import files, jsonl
from llm2vec_gen_jax.common.errors import InputError
from tests.conftest import TMP_PATH

# A JSONL file that is appended to


RUN = {"model": "a", "sampling": {"seed": 0}}
BATCHES = [[{"id": 0, "text": "é \u2028\n"}], [{"id": 1}, {"id": 2, "text": "🙂"}], [], [{"id": 3}]]
ROWS = [row for batch in BATCHES for row in batch]


def test_nothing_is_lost_or_repeated_whatever_byte_a_kill_leaves(tmp_path):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, RUN) as output:
        for batch in BATCHES:
            output.append(batch)
    whole = path.read_bytes()
    assert [row for _, row in jsonl.read_jsonl(path)] == ROWS
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with jsonl.JsonlAppender(path, RUN) as output:
            assert output.rows == ROWS[: whole[:cut].count(b"\n")]
            output.append(ROWS[len(output.rows) :])
            assert output.rows == ROWS
        assert path.read_bytes() == whole


@hypothesis.given(st.lists(st.integers(0, 400), max_size=12))
@hypothesis.settings(TMP_PATH, max_examples=30)
def test_nothing_is_lost_over_repeated_kills(tmp_path, cuts):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": number, "text": "é🙂"[: number % 3]} for number in range(10)]
    path.unlink(missing_ok=True)
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(rows[:1])
    for cut in cuts:
        with jsonl.JsonlAppender(path, RUN) as output:
            output.append(rows[len(output.rows) : len(output.rows) + 2])
        path.write_bytes(path.read_bytes()[: max(cut, path.stat().st_size - 30)])
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(rows[len(output.rows) :])
    assert [row for _, row in jsonl.read_jsonl(path)] == rows


def test_other_settings_and_foreign_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(ROWS)
    whole = path.read_bytes()
    with pytest.raises(InputError, match=r"rows.jsonl: holds another run \(sampling.seed: 0 -> 1\).*overwrite"):
        jsonl.JsonlAppender(path, {"model": "a", "sampling": {"seed": 1}})
    assert path.read_bytes() == whole
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text("no newline at the end")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="notes.jsonl: exists, and was not written by this command"):
            jsonl.JsonlAppender(foreign, RUN, overwrite)
    assert foreign.read_text() == "no newline at the end"
    with jsonl.JsonlAppender(path, RUN, overwrite=True) as output:
        assert output.rows == ROWS, "an interrupted command with overwrite=true is resumed"
    with jsonl.JsonlAppender(path, {"model": "b"}, overwrite=True) as output:
        assert output.rows == []
    assert path.read_bytes() == b""


def test_a_file_that_another_process_appends_to_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(ROWS[:2])
        with pytest.raises(InputError, match="rows.jsonl: another process is writing to it"):
            jsonl.JsonlAppender(path, RUN)
        output.append(ROWS[2:])
    with jsonl.JsonlAppender(path, RUN) as output:
        assert output.rows == ROWS


@hypothesis.given(st.integers(0, 10**6), st.sampled_from(["rows.jsonl", "rows.jsonl.crc32"]), st.binary(max_size=3))
@hypothesis.settings(TMP_PATH, max_examples=200)
def test_what_is_damaged_is_appended_again(tmp_path, place, name, bytes_there):
    """Bytes overwritten, taken out or put in anywhere, in the lines or in their checksums."""
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    with jsonl.JsonlAppender(path, RUN) as output:
        for batch in BATCHES:
            output.append(batch)
    whole = path.read_bytes()
    damaged = tmp_path / name
    content = damaged.read_bytes()
    place %= len(content)
    for end in (place, place + 1, place + len(bytes_there)):
        damaged.write_bytes(content[:place] + bytes_there + content[end:])
        with jsonl.JsonlAppender(path, RUN) as output:
            assert output.rows == ROWS[: len(output.rows)]
            output.append(ROWS[len(output.rows) :])
        assert path.read_bytes() == whole
        assert len((tmp_path / "rows.jsonl.crc32").read_bytes()) == 4 * len(ROWS)


def test_a_line_that_was_changed_is_named(tmp_path, messages):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(ROWS)
    path.write_bytes(path.read_bytes().replace(b'{"id": 1}', b'{"id": 7}'))
    with jsonl.JsonlAppender(path, RUN) as output:
        assert output.rows == ROWS[:1]
    assert f"{path}, line 2: wrong checksum; computed again from this line on" in messages()


def test_without_checksums_a_damaged_line_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    with jsonl.JsonlAppender(path, RUN) as output:
        output.append(ROWS)
    (tmp_path / "rows.jsonl.crc32").unlink()  # as files of before have none
    damaged = path.read_bytes().replace(b'{"id": 1}', b'{"id": 1')
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="rows.jsonl, line 2: not valid JSON"):
        jsonl.JsonlAppender(path, RUN)
    assert path.read_bytes() == damaged


SETTINGS = st.recursive(
    st.integers() | st.text() | st.lists(st.integers()),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@hypothesis.given(SETTINGS, SETTINGS)
def test_changes_names_what_differs_and_only_that(one, two):
    old, new = {"same": one, "part": {"x": one}}, {"same": one, "part": {"x": two}}
    found = files.diff(old, new)
    assert (found == "") == (one == two)
    assert found == "" or found.startswith("part.x")


# Atomic files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyError), files.atomic_directory(tmp_path / "b") as temporary:
        (temporary / "c").mkdir()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_any_text_of_json_can_be_written_and_read_again(tmp_path):
    record = {"name": "half of a pair: \ud800", "\udfff": "é"}
    files.write_json(tmp_path / "record.json", record)
    assert files.read_json(tmp_path / "record.json") == record
    with jsonl.JsonlAppender(tmp_path / "rows.jsonl", record) as appender:
        appender.append([record])
    with jsonl.JsonlAppender(tmp_path / "rows.jsonl", record) as appender:
        assert appender.rows == [record]
    files.write_json(tmp_path / "plain.json", {"name": "é"})
    assert "é" in (tmp_path / "plain.json").read_text(), "letters stay letters"


def test_what_begins_with_a_dot_is_no_part_of_a_folder(tmp_path):
    """The folder itself may: only names inside it count."""
    folder = tmp_path / ".data"
    paths = ("b.txt", "a/c.txt", ".hidden.txt", ".ipynb_checkpoints/b-checkpoint.txt", "a/.git/x/d.txt", "a/e.md")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    assert files.visible(folder, "*.txt") == [folder / "a/c.txt", folder / "b.txt"]
    assert files.visible(folder) == [folder / "a/c.txt", folder / "a/e.md", folder / "b.txt"]


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("x")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    for name in ("first", "second"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "itself").symlink_to(tmp_path / "here")
    assert files.visible(tmp_path / "here") == [tmp_path / "here/first/a.txt"]
    (tmp_path / "here" / "task").symlink_to("gone")
    with pytest.raises(InputError, match="here/task: link to gone, which does not exist"):
        files.visible(tmp_path / "here", "task.json")
