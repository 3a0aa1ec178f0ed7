# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and checked to be writable before the work starts."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["check_library", "check_writable", "written_whole"]

_ELF64 = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HEADER_BYTES = 64


def check_library(path: str | os.PathLike[str]) -> None:
    """Raise OSError if a shared library is cut off: loading it would end the process (SIGBUS).

    Libraries of other systems than Linux's are passed over.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER_BYTES)
        if size < _HEADER_BYTES:
            raise OSError(f"it has {size} bytes: it is cut off")
        if not header.startswith(_ELF64):
            return
        at, entry, count = (
            int.from_bytes(header[i : i + n], "little") for i, n in ((32, 8), (54, 2), (56, 2))
        )
        file.seek(at)
        entries = file.read(entry * count)
    end = at + entry * count
    if size >= end:
        # of each segment, where its bytes begin in the file and how many they are
        pairs = (
            entries[i + 8 : i + 16] + entries[i + 32 : i + 40]
            for i in range(0, len(entries), entry)
        )
        end = max(int.from_bytes(p[:8], "little") + int.from_bytes(p[8:], "little") for p in pairs)
    if size < end:
        raise OSError(f"it has {size} bytes of {end}: it is cut off")


def check_writable(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Return the file that ``path`` stands for, or raise if it could not be written.

    Parameters
    ----------
    path
        A file to be made or replaced; links are followed.
    name
        The argument's name, for the message.

    Raises
    ------
    ValueError
        If the folder is missing or may not be written to, or ``path`` is there and no plain file.
    """
    target = pathlib.Path(os.path.realpath(path))
    wanted = f"{name}: wanted a file in a folder that can be written to, got {os.fspath(path)}"
    if target.exists() and not target.is_file():
        raise ValueError(f"{wanted} (not a plain file)")
    if not target.parent.is_dir():
        raise ValueError(f"{wanted} (no folder {target.parent})")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{wanted} (no permission)")
    return target


@contextmanager
def written_whole(path: str | os.PathLike[str], name: str) -> Iterator[pathlib.Path]:
    """Yield a new file beside ``path`` to write to, which becomes ``path`` when the block ends.

    Readers see the old file or the new one, complete, even after a crash: the bytes are on the disk
    before the name is. If the block raises, ``path`` is as it was and the new file is gone.

    Parameters
    ----------
    path, name
        As for :func:`check_writable`.

    Raises
    ------
    ValueError
        As :func:`check_writable`.
    OSError
        With the file's name, if the disk is full, for instance.

    Yields
    ------
    Path
        With the suffix of ``path``, which some writers choose their format by.
    """
    target = check_writable(path, name)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    descriptor, fresh = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix
    )
    os.close(descriptor)
    try:
        yield pathlib.Path(fresh)
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(fresh, mode)
        os.replace(fresh, target)
    except BaseException as error:
        pathlib.Path(fresh).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target)  # of a full disk: which file, as of all other errors
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
