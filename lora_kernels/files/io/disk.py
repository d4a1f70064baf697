"""Locks, free space, and waiting until files are on the disk."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def try_lock(descriptor: int) -> bool:
    """Locks an open file until it is closed or released; False if another process has locked it.

    On Windows, which has no fcntl, nothing is locked.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def wait_for_lock(descriptor: int) -> bool:
    """Like `try_lock`, but waits for other processes and threads. False if the file system has no
    locks.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def is_locked(descriptor: int) -> bool:
    """Whether another process has locked the file, as in `try_lock`. Several may ask at once."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def release(descriptor: int) -> None:
    """Unlocks and closes a file."""
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks
            # Forked processes share the file: if it were only closed here, it would stay locked.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def mount_of(folder: Path) -> tuple[int, str]:
    """The device and, on Linux, the mount of a folder. Nothing can be renamed across mounts, not
    even on one device.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        device, mount = os.fstat(descriptor).st_dev, ""
        info = Path(f"/proc/self/fdinfo/{descriptor}")
        if info.exists():
            lines = [line for line in info.read_text().splitlines() if line.startswith("mnt_id")]
            mount = "".join(lines)
        return device, mount
    finally:
        os.close(descriptor)


def check_space(out: Path, size: int) -> None:
    """Raises OSError if the disk has less free space than `size` bytes."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{out} needs {size / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
