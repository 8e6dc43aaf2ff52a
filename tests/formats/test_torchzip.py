"""The reader and writer of torch files: round trips, and everything that must be refused without running."""

import os
import pickle
import types
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import torchzip

DTYPES = [np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)]


def arrays():
    shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    return st.builds(
        lambda shape, dtype, seed: np.random.default_rng(seed).normal(size=shape).astype(dtype),
        shapes,
        st.sampled_from(DTYPES),
        st.integers(0, 99),
    )


@hypothesis.given(
    tensors=st.dictionaries(st.text(max_size=8), arrays(), max_size=4),
    config=st.dictionaries(st.text(max_size=8), st.integers(-(2**40), 2**40) | st.text(max_size=8), max_size=3),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_torch_file_round_trip(tmp_path_factory, tensors, config):
    path = tmp_path_factory.mktemp("torchzip") / "head"
    torchzip.write(path, tensors, config)
    first = path.read_bytes()
    found, found_config = torchzip.read(path)
    assert found_config == config
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()
    torchzip.write(path, {name: value.copy() for name, value in tensors.items()}, dict(config))
    assert path.read_bytes() == first


def zip_with(path, program, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("head/data.pkl", program)
        for number, data in records.items():
            archive.writestr(f"head/data/{number.removeprefix('r')}", data)


def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "head"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for protocol in (0, 2, 4):
        zip_with(path, pickle.dumps({"state_dict": {}, "config": {"x": Hostile()}}, protocol))
        with pytest.raises(InputError, match=str(path)) as error:
            torchzip.read(path)
        assert not marker.exists()
        if protocol == 2:
            assert f"{os.system.__module__}.system" in str(error.value)
    zip_with(path, b"\x80\x02ccollections\nOrderedDict\n}(X\x05\x00\x00\x00itemsK\x01ub.")
    with pytest.raises(InputError, match=str(path)):
        torchzip.read(path)


def doubled(times):
    """The instructions of a tuple of 2**times empty tuples, in which each pair is one tuple twice."""
    return b")" + b"q\x00h\x00\x86" * times


@pytest.mark.parametrize("place", ["key", "size", "record", "class", "state", "config"])
def test_a_tuple_of_many_tuples_is_refused_at_once(tmp_path, place):
    """To hash, compare or print one of 2**90 takes for ever, in native code that no signal ends."""
    storage = b"(" + pickle.dumps("storage", 2)[2:-1] + b"ctorch\nFloatStorage\n"
    record = storage + pickle.dumps("0", 2)[2:-1] + pickle.dumps("cpu", 2)[2:-1] + b"K\x04tQ"
    program = {
        "key": b"}" + doubled(90) + b"K\x01s.",
        "size": b"ctorch._utils\n_rebuild_tensor_v2\n(" + record + b"K\0" + doubled(90) + b"(K\x01t\x89}tR.",
        "record": storage + doubled(90) + b"X\x03\0\0\0cpuK\x04tQ.",
        "class": b"(X\x07\0\0\0storage" + doubled(90) + b"X\x03\0\0\0cpuX\x01\0\0\0aK\x04tQ.",
        "state": b"}X\x0a\0\0\0state_dict" + doubled(90) + b"sX\x06\0\0\0config}s.",
        "config": b"}(X\x0a\0\0\0state_dict}X\x06\0\0\0config}X\x01\0\0\0a" + doubled(90) + b"su.",
    }[place]
    zip_with(tmp_path / "head", b"\x80\x02" + program, r0=bytes(16))
    assert (tmp_path / "head").stat().st_size < 1000
    with pytest.raises(InputError, match="head: not a readable torch file of tensors .*nested tuples"):
        torchzip.read(tmp_path / "head")


def test_no_value_of_a_torch_file_is_shown_whole(tmp_path):
    long = "x" * 500_000
    programs = [
        pickle.dumps({"state_dict": {}, "config": {long: [1]}}, 2),
        pickle.dumps({"state_dict": {long: 1}, "config": {}}, 2),
        b"\x80\x02c" + long.encode() + b"\nname\n.",
        b"\x80\x02(K\x01" + b"h\x00" * 400_000 + b"t.",
        torchzip._program({"a": claims((2**40,) * 9, 4)}, {}),
        torchzip._program({"a": claims((2**31,) * 300, 4)}, {}),
    ]
    for program in programs:
        zip_with(tmp_path / "head", program, r0=bytes(16))
        with pytest.raises(InputError) as error:
            torchzip.read(tmp_path / "head")
        assert str(error.value).isprintable() and len(str(error.value)) < 600


SOUND = torchzip._program({"a": np.arange(4, dtype=np.float32)}, {"size": 1})
PIECES = [
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"(X\x04\0\0\0true",
    b"tR",
    b"R",
    b"b",
    b"}",
    b")",
    b"\x81",
    b"i",
    b"Q",
    b".",
]


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(max_size=3) | st.sampled_from(PIECES)), max_size=6)
)
@hypothesis.settings(max_examples=300)
def test_any_change_of_a_pickle_gives_tensors_or_is_refused(tmp_path_factory, edits):
    """Whatever comes out is made of arrays of the one record and plain values: nothing else can be named."""
    program = SOUND
    for place, piece in edits:
        program = program[:place] + piece + program[place + len(piece) // 2 :]
    path = tmp_path_factory.mktemp("torchzip") / "head"
    zip_with(path, program, r0=np.arange(4, dtype=np.float32).tobytes())
    try:
        tensors, config = torchzip.read(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert all(type(value) is np.ndarray and value.nbytes <= 16 for value in tensors.values())
        assert all(isinstance(value, (str, int, float, type(None))) for value in config.values())


def claims(shape, count):
    """What _program needs of an array: the truth about its storage may differ."""
    return types.SimpleNamespace(shape=shape, ndim=len(shape), size=count, dtype=np.dtype(np.float32))


def test_damaged_torch_files_name_the_file(tmp_path):
    path = tmp_path / "head"
    four = np.arange(4, dtype=np.float32)
    program = torchzip._program({"a": four}, {})
    torchzip.write(path, {"a": four}, {"size": 1})
    whole = path.read_bytes()
    cases = [lambda end=end: path.write_bytes(whole[:end]) for end in range(0, len(whole), 97)]
    flipped = bytearray(whole)
    flipped[whole.index(four.tobytes())] ^= 1
    cases += [
        lambda: path.unlink(),
        lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        lambda: path.write_bytes(flipped),
        lambda: zip_with(path, program),
        lambda: zip_with(path, program, r0=four.tobytes()[:-4]),
        lambda: zip_with(path, program, r0=four.tobytes(), compression=zipfile.ZIP_DEFLATED),
        lambda: zip_with(path, torchzip._program({"a": claims((5,), 4)}, {}), r0=four.tobytes()),
        lambda: zip_with(path, b"\x80\x02N."),
        lambda: zip_with(path, pickle.dumps({"state_dict": {}, "config": {}, "more": 1}, 2)),
        lambda: zip_with(path, pickle.dumps({"state_dict": {"a": 1}, "config": {}}, 2)),
        lambda: zip_with(path, pickle.dumps({"state_dict": {}, "config": {"a": [1]}}, 2)),
        lambda: zip_with(path, b"\x80\x02Nr\xff\xff\xff\x7f."),
        lambda: zip_with(path, b"\x80\x02N" + b"0N" * torchzip.MAX_PICKLE_BYTES + b"."),
    ]
    for case in cases:
        case()
        with pytest.raises(InputError, match=str(path)):
            torchzip.read(path)
    zip_with(path, program, r0=four.tobytes())
    np.testing.assert_array_equal(torchzip.read(path)[0]["a"], four)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (4,), (1,)),
        (0, (2, 2), (4, 1)),
        (0, (5,), (0,)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (5, (0,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(offset, size, stride):
    storage = np.arange(4, dtype=np.float32)
    with pytest.raises(pickle.UnpicklingError):
        torchzip._rebuild(storage, offset, size, stride)
    np.testing.assert_array_equal(torchzip._rebuild(storage, 1, (2,), (2,)), [1, 3])
