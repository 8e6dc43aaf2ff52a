"""File locks on outputs and temporary files, which the kernel releases when their process exits."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from llm2vec_gen_jax.common.errors import InputError

logger = logging.getLogger(__name__)

# Raised by file systems without locks, such as some network file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)


def try_lock(handle: int) -> bool | None:
    """Locks an open file or folder. Returns False if it is locked already, None if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def is_at(handle: int, path: str | os.PathLike) -> bool:
    """Whether an open file is still at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


class Lock:
    """A lock file, created by `acquire` and removed by `release`. After a kill the file remains, unlocked."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.handle: int | None = None
        self.created: list[pathlib.Path] = []

    def acquire(self) -> bool:
        """Tries to lock; creates missing parent folders. Returns whether this process holds the lock."""
        while self.handle is None:
            self.created += [folder for folder in self.path.parents if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process has just removed its empty folder
                continue
            if (locked := try_lock(handle)) is False:
                os.close(handle)
                return False
            if locked is None:
                logger.warning(f"{self.path.parent}: has no file locks; ensure that no other process writes there")
            # The previous holder may have removed this file after it was opened; another process can lock a new one.
            if is_at(handle, self.path):
                self.handle = handle
            else:
                os.close(handle)
        return True

    def release(self) -> None:
        """Removes the lock file, and the folders created for it if they are empty."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                if is_at(self.handle, self.path):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None
        for folder in self.created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.created = []


@contextlib.contextmanager
def locked(path: str | os.PathLike, key: str | None = None) -> Iterator[None]:
    """Holds the lock on an output `path`, a file or folder that need not exist yet.

    The lock is the file `.NAME.lock` next to it, so that the folder itself can be removed. key: the setting of `path`.
    Raises InputError if another process holds the lock.
    """
    place = path if key is None else f"{key}={path}"
    target = pathlib.Path(os.path.realpath(path))
    lock: Lock | _FolderLock = Lock(target.with_name(f".{target.name}.lock"))
    try:
        acquired = lock.acquire()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and target.is_dir():
            lock = _FolderLock(target)  # its parent is read-only, as for a folder mounted into a container
            acquired = lock.acquire()
        else:
            named = str(path) if error.filename in (None, str(lock.path)) else str(error.filename)
            raise OSError(error.errno, error.strerror, named) from error
    if not acquired:
        raise InputError(f"{place}: another process is writing to it. Wait until it ends, or choose another output")
    try:
        yield
    finally:
        lock.release()


class _FolderLock:
    """A lock on a folder itself."""

    def __init__(self, path):
        self.path, self.handle = path, os.open(path, os.O_RDONLY)

    def acquire(self):
        return try_lock(self.handle) is not False

    def release(self):
        os.close(self.handle)


def remove_unlocked(path: pathlib.Path) -> None:
    """Removes a temporary file or folder unless its process still holds the lock on it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if try_lock(handle):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary(path: str | os.PathLike, folder: bool = False) -> Iterator[pathlib.Path]:
    """Yields a new temporary file or folder next to `path`, locked until it is removed at the end.

    An unlocked one was left by a killed process, and is removed by the next call.
    """
    path = pathlib.Path(path)
    prefix, suffix = f".{path.name}.tmp-", "" if folder else path.suffix
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    while True:
        if folder:
            name = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
            try:
                handle = os.open(name, os.O_RDONLY)
            except FileNotFoundError:
                continue
        else:
            handle, file = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
            name = pathlib.Path(file)
        if try_lock(handle) is not False and is_at(handle, name):
            break  # else another process removed it as abandoned before it was locked
        os.close(handle)
    try:
        yield name
    finally:
        if is_at(handle, name):
            shutil.rmtree(name, ignore_errors=True) if folder else name.unlink(missing_ok=True)
        os.close(handle)


def remove_abandoned(path: pathlib.Path) -> None:
    """Removes temporary files of `path` left by killed processes."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-\w{{8}}({re.escape(path.suffix)})?")
    for old in path.parent.iterdir():
        if pattern.fullmatch(old.name):
            remove_unlocked(old)
