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

from llm2vec_gen_jax.errors import InputError
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
        torchzip._Rebuild()(storage, offset, size, stride)
    np.testing.assert_array_equal(torchzip._Rebuild()(storage, 1, (2,), (2,)), [1, 3])
