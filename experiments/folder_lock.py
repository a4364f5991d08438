"""One process at a time in a folder of results."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib

FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """Keeps other processes out of a folder until it is closed, or until the process ends, however it does."""

    def __init__(self, folder: pathlib.Path):
        """Takes the lock.

        Args:
          folder: where; made where missing.

        Raises:
          ValueError: another process has it, named by its id.
          OSError: the folder cannot be made, or its file system knows no locks.
        """
        import fcntl  # POSIX has it; the rest of this package can be read elsewhere

        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / FILE, "a+", encoding="ascii", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read(20).strip()
            holder = f"process {holder}" if holder.isdecimal() else "another process"
            self._file.close()
            if error.errno not in _HELD:
                raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(folder / FILE)) from None
            raise ValueError(
                f"--output_dir: {holder} writes to {folder}; wait until it has ended, or pass another folder."
            ) from None
        try:
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes once more
                self._file.close()
            raise OSError(error.errno, error.strerror, str(folder / FILE)) from None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others in. The file stays: who removed it could remove the lock of the next process."""
        self._file.close()
