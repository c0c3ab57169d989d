"""The output folder of a run before the run starts: its lock, permissions and free space.

Imports no heavy module, since these checks come first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path

from fastmtl.errors import UserError

LOCK = ".lock"
NO_RUN = (LOCK, "lost+found")  # names that a folder without a run may contain
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class OutputFolder:
    """A run's lock on its output folder, until `release` or any end of the process.

    Rank 0 of a run makes this object and keeps it. The lock is a POSIX record lock. The end of a
    process releases it, child processes do not inherit it, and other hosts see it on network file
    systems (NFS with its lock service, Lustre mounted with flock).

    resume: the folder may contain a run already. Raises UserError if another process has the lock,
    if the folder contains a run, or if it is not writable.
    """

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self._directory = directory
        _check_writable(directory)
        self._lock = _locked(directory)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            _check_unused(directory, resume)
        except UserError:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock."""
        os.close(self._lock)


def check_output(directory: Path, *, resume: bool) -> None:
    """Raise those UserErrors of `OutputFolder` that can be found without writing anything."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(directory)
        place = _existing(directory)
        if not place.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(directory, error) from None
    if place == directory:
        if (directory / LOCK).is_file():
            os.close(_locked(directory))
        _check_unused(directory, resume)


def check_room(directory: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder has less than `needed` bytes free.

    The folder need not exist yet.
    """
    disk = shutil.disk_usage(_existing(directory))
    if disk.total and disk.free < needed:  # some network file systems report no size
        raise UserError(
            f"{directory}: no space: a checkpoint and model/ take at least {needed / 2**20:,.1f} MiB, the disk has "
            f"{disk.free / 2**20:,.1f} MiB left. Make room, or choose another disk with --output DIR"
        )


def _check_writable(directory: Path) -> None:
    """Create the folder; raise UserError if no file can be written in it.

    A test file is written, since permission bits alone do not prove that writing works.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".try-", dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> UserError:
    if isinstance(error, FileExistsError):
        what = "a link to nothing" if directory.is_symlink() and not directory.exists() else "a file"
        return UserError(f"the output directory {directory} is {what}: choose another place with --output DIR")
    return UserError(f"cannot write to the output directory {directory}: {error.strerror}")


def _check_unused(directory: Path, resume: bool) -> None:
    if not resume and any(path.name not in NO_RUN for path in directory.iterdir()):
        raise UserError(
            f"{directory} already contains a run: continue it with --resume, or choose another place with --output DIR"
        )


def _locked(directory: Path) -> int:
    """Lock the folder; return the descriptor of the lock file. Closing it releases the lock.

    Raises UserError if another process has the lock.
    """
    try:
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(directory / LOCK, error) from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 200, 0).decode("utf-8", "replace").strip()
        os.close(lock)
        if error.errno in NO_LOCKS:
            raise UserError(
                f"{directory} is on a file system without locks ({error.strerror}), where two runs could "
                "overwrite each other: choose another place with --output DIR"
            ) from None
        raise UserError(
            f"another run{f' ({holder})' if holder else ''} is writing to {directory}: wait for its end, or "
            "choose another place with --output DIR"
        ) from None
    return lock


def _existing(directory: Path) -> Path:
    """Return the folder or its nearest existing parent. A dead link counts as existing."""
    return next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
