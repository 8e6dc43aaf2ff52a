"""Checkpoints: what is damaged is never restored, and the newest sound one is used instead."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.training.checkpoints import Checkpoints, _digests

# Readers that meet damage leave their futures behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RECORD = {"backbone": "a", "shapes": {"tokens": [10, 8]}}


def state_of(step):
    random = np.random.default_rng(step)
    arrays = {"tokens": random.normal(size=(10, 8)), "head": {"kernel": random.normal(size=(64, 64))}}
    return {"trainable": jax.tree.map(jnp.float32, arrays), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, RECORD, 3)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
        checkpoints.wait()
    checkpoints.close()
    return folder


def restore(folder, record=RECORD):
    checkpoints = Checkpoints(folder, record, 3)
    try:
        return checkpoints, checkpoints.restore(jax.tree.map(jnp.zeros_like, state_of(0)))
    finally:
        checkpoints.close()


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_newest_is_restored(saved):
    state, step = restore(saved)[1]
    assert step == 2
    assert_equal_trees(state, state_of(2))


def flip(path, random):
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


def cut(path, random):
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


def remove(path, random):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_what_is_damaged_is_never_restored(saved, tmp_path, damage, messages):
    files = sorted(
        path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file() and path.stat().st_size
    )
    refused = 0
    for seed in range(24):
        random = np.random.default_rng([seed, 1])
        folder = tmp_path / str(seed)
        shutil.copytree(saved, folder)
        damage(folder / files[seed % len(files)], random)
        state, step = restore(folder)[1]
        assert_equal_trees(state, state_of(step))  # harmless (2), or the older one (1): never anything else
        said = messages()
        assert (step == 1) == (f"{folder / '2'}: damaged (" in said)
        assert (step == 1) == any(folder.glob("_damaged/2.*"))
        refused += step == 1
    assert refused >= 4


def test_a_step_that_was_set_aside_can_be_saved_again(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for path in (folder / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(folder, RECORD, 3)
    like = jax.tree.map(jnp.zeros_like, state_of(0))
    assert checkpoints.restore(like)[1] == 1
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    state, step = checkpoints.restore(like)
    checkpoints.close()
    assert step == 2
    assert_equal_trees(state, state_of(2))


def test_when_none_is_sound_all_stay_and_are_named(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(InputError, match="all checkpoints are damaged .2: .*; 1: .*overwrite=true"):
        restore(folder)
    assert (folder / "1").is_dir() and (folder / "2").is_dir()


def test_nothing_at_all_is_none_and_another_run_is_refused(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    assert restore(folder)[1] is None
    with pytest.raises(InputError, match="checkpoints/2: is of another run .backbone: 'a' -> 'b'"):
        restore(saved, RECORD | {"backbone": "b"})
    assert (saved / "2").is_dir()


def test_every_change_of_one_element_changes_its_digest_on_any_devices():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = _digests({"x": jnp.array(x)})
    for spec in (jax.P(), jax.P("data"), jax.P(None, "data")):
        assert _digests({"x": jax.device_put(x, jax.NamedSharding(mesh, spec))}) == whole
    bits = x.view(np.uint32)
    for index in np.ndindex(x.shape):
        changed = bits.copy()
        changed[index] ^= 1 << (sum(index) % 32)
        assert _digests({"x": jnp.array(changed.view(np.float32))}) != whole
