"""The output folder of a run before the run starts: who may write there, and whether there is room.

Nothing heavy is imported: these checks come first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path

from fastmtl.errors import UserError

LOCK = ".lock"
NO_RUN = (LOCK, "lost+found")  # what a folder may hold that holds no run
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class OutputFolder:
    """A folder that this process holds for a run, until `release` or the end of the process, however that comes.

    The first process of a run makes one and keeps it. The lock is a POSIX record lock: no file that a killed process
    leaves behind, not inherited by child processes, and on network file systems one that other hosts see too (NFS with
    its lock service, Lustre mounted with flock).
    resume: the folder may hold a run already. Raises UserError where another process holds it, where it holds a run,
    and where it cannot be written.
    """

    def __init__(self, directory: Path, *, resume: bool) -> None:
        self._directory = directory
        _check_writable(directory)
        self._lock = self._hold()
        used = sorted(path.name for path in directory.iterdir() if path.name not in NO_RUN)
        if used and not resume:
            self.release()
            raise UserError(
                f"{directory} already holds a run: go on with it by --resume, or choose another place by --output DIR"
            )

    def release(self) -> None:
        """Let other processes have the folder."""
        os.close(self._lock)

    def _hold(self) -> int:
        lock = os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 200, 0).decode("utf-8", "replace").strip()
            os.close(lock)
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"{self._directory} is on a file system without locks ({error.strerror}), where two runs could "
                    "overwrite each other: choose another place by --output DIR"
                ) from None
            raise UserError(
                f"another run{f' ({holder})' if holder else ''} is writing to {self._directory}: wait for its end, or "
                "choose another place by --output DIR"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return lock


def check_room(directory: Path, needed: int) -> None:
    """Raise UserError where the disk of a folder, or of where it will be, has less than `needed` bytes left."""
    disk = shutil.disk_usage(next(path for path in (directory, *directory.absolute().parents) if path.is_dir()))
    if disk.total and disk.free < needed:  # some network file systems do not tell their size
        raise UserError(
            f"{directory}: no space: a checkpoint and model/ take at least {needed / 2**20:,.1f} MiB, the disk has "
            f"{disk.free / 2**20:,.1f} MiB left. Make room, or choose another disk by --output DIR"
        )


def _check_writable(directory: Path) -> None:
    """The folder is there and takes a file; a file's own name and content say more than permission bits do."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".try-", dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
    except FileExistsError:
        what = "a link to nothing" if directory.is_symlink() and not directory.exists() else "a file"
        raise UserError(f"the output directory {directory} is {what}: choose another place by --output DIR") from None
    except OSError as error:
        raise UserError(f"cannot write to the output directory {directory}: {error.strerror}") from None
