"""Locks that the kernel releases with the process that holds them: of outputs, and of what is temporary."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import tempfile

from llm2vec_gen_jax.common.errors import InputError

# What a file system without locks, such as some network ones, answers.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)


def take(handle):
    """Locks an open file or folder. Returns whether that was possible: False where another open file has it locked,
    None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def is_at(handle, path):
    """Whether an open file is what is at `path` now: it may have been removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


class Lock:
    """A lock file, made by `acquire` and removed by `release`; after a kill it stays, and locks nothing."""

    def __init__(self, path):
        self.path, self.handle, self.made = pathlib.Path(path), None, []

    def acquire(self):
        """Returns whether this process holds the lock now. Folders that are missing above it are made."""
        while self.handle is None:
            self.made += [folder for folder in self.path.parents if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process has just removed the folder that it had made
                continue
            if (taken := take(handle)) is False:
                os.close(handle)
                return False
            if taken is None:
                print(f"{self.path.parent}: has no file locks; see that no other process writes there", flush=True)
            # Who held it before may have removed it since it was opened here: then another process can lock a new one.
            if is_at(handle, self.path):
                self.handle = handle
            else:
                os.close(handle)
        return True

    def release(self):
        """Removes the lock file, and the folders that were made for it and are empty."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                if is_at(self.handle, self.path):
                    self.path.unlink()
            os.close(self.handle)
            self.handle = None
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.made = []


@contextlib.contextmanager
def locked(path, key=None):
    """Lets one process at a time into the block, which writes `path`: a file or a folder that need not exist yet.

    The lock is the file `.NAME.lock` beside it, so that the folder itself may be removed. key: the setting that names
    the path. Raises InputError where another process is in its block.
    """
    place = path if key is None else f"{key}={path}"
    target = pathlib.Path(os.path.realpath(path))
    lock = Lock(target.with_name(f".{target.name}.lock"))
    try:
        taken = lock.acquire()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and target.is_dir():
            lock = _FolderLock(target)  # as mounted into a container: only what is in it can be written
            taken = lock.acquire()
        else:
            named = str(path) if error.filename in (None, str(lock.path)) else str(error.filename)
            raise OSError(error.errno, error.strerror, named) from error
    if not taken:
        raise InputError(f"{place}: another process is writing to it. Wait until it ends, or choose another output")
    try:
        yield
    finally:
        lock.release()


class _FolderLock:
    """A lock on a folder itself."""

    def __init__(self, path):
        self.handle = os.open(path, os.O_RDONLY)

    def acquire(self):
        return take(self.handle) is not False

    def release(self):
        os.close(self.handle)


def remove_unlocked(path):
    """Removes a temporary file or folder that its process, which kept it locked, no longer holds."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if take(handle):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary(path, folder=False):
    """Yields the path of a new temporary file or folder beside `path`, which is removed at the end if it is there.

    It is locked for as long: one that is not was left by a process that was killed, and is removed by the next call.
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
        if take(handle) is not False and is_at(handle, name):
            break  # else another process took it for one that was left, before it was locked
        os.close(handle)
    try:
        yield name
    finally:
        if is_at(handle, name):
            shutil.rmtree(name, ignore_errors=True) if folder else name.unlink(missing_ok=True)
        os.close(handle)


def remove_abandoned(path):
    """Removes what processes that were killed while they wrote `path` left beside it."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.tmp-\w{{8}}({re.escape(path.suffix)})?")
    for old in path.parent.iterdir():
        if pattern.fullmatch(old.name):
            remove_unlocked(old)
