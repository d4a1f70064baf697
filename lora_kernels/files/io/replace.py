"""Replaces the files of a folder together: a killed process leaves all old files or all new ones.

The new files are written to a temporary folder (a stage), synced to the disk, and then renamed.
Several processes and threads may replace the files of one folder at the same time: each writes its
own stage, they rename one after the other, and the last one wins. The next writer removes the
stages of killed processes; a lock protects the stages that are in use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from .disk import is_at, mount_of, release, sync, try_lock, wait_for_lock

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The first file in a stage; it exists until all others are complete. Its lock is the stage's lock.
_INCOMPLETE = ".unfinished"


def replace_files(
    folder: Path,
    main: str,
    write_main: Callable[[Path], None],
    others: Mapping[str, bytes],
    owned: Collection[str],
) -> int:
    """Replaces the files in `folder` by `main`, written by `write_main(path)`, and `others`,
    {name: content}.

    Existing files with a name in `owned` that are not written again are removed; all others stay.
    The new files take effect at the moment when `main` is renamed.

    If only `main` changes, it is the only file that is renamed. If other files change too, and the
    folder holds only `owned` files, the whole folder is exchanged in one step where the system
    allows it (Linux). Otherwise the others are removed before `main` is renamed, and renamed last:
    in between, a reader may find them missing, but never with content that does not belong to
    `main`.

    Returns:
        The size of `main` in bytes, even if another process has replaced it since.

    Raises:
        ValueError: `folder` is a file.
        OSError: for example, the disk is full; the old files are then intact.

    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with _locked(folder) as locked:
        if locked:
            _remove_leftovers(folder, owned)
    # The stage ends first, so that the lock covers its removal too.
    with ExitStack() as lock, _staged(folder, owned) as stage:
        write_main(stage / main)
        # safetensors creates files that only their owner can read.
        shutil.copymode(stage / _INCOMPLETE, stage / main)
        sync(stage / main)
        size = (stage / main).stat().st_size
        lock.enter_context(_locked(folder))
        _put_in_place(stage, folder, main, others, owned)
    return size


def _put_in_place(
    stage: Path, folder: Path, main: str, others: Mapping[str, bytes], owned: Collection[str]
) -> None:
    """Completes a stage that holds `main`, and renames its files, or the whole, into place."""
    present = {entry.name for entry in folder.iterdir()}
    stale = present.intersection(owned).difference([main, *others])
    same = not stale and all(
        name in present and (folder / name).read_bytes() == content
        for name, content in others.items()
    )
    changing = () if same else tuple(others)
    for name in changing:
        (stage / name).write_bytes(others[name])
        sync(stage / name)
    (stage / _INCOMPLETE).unlink()
    sync(stage)
    whole = not same and stage.parent != folder and present.issubset(owned)
    if whole and _exchange(stage, folder):
        sync(folder.parent)
        return
    for name in changing:
        (folder / name).unlink(missing_ok=True)
    (stage / main).replace(folder / main)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for name in changing:
        (stage / name).replace(folder / name)
    sync(folder)


@contextmanager
def _staged(folder: Path, owned: Collection[str]) -> Iterator[Path]:
    """A new folder for the files of `folder`. It is removed at the end of the block; if it was
    exchanged for the old folder, the old folder is removed.
    """
    stage, lock = _new_stage(folder)
    try:
        # The stage may take the folder's place, but mkdtemp lets only the owner read it.
        shutil.copymode(folder, stage)
        yield stage
    finally:
        try:
            _discard(stage, folder, owned)
        finally:
            release(lock)


def _new_stage(folder: Path) -> tuple[Path, int]:
    """A new stage, and the open file whose lock protects it."""
    while True:
        stage = Path(mkdtemp(prefix=_prefix(folder), dir=_place(folder)))
        mark = stage / _INCOMPLETE
        # Before the stage is locked, another process may take it for a killed process's and remove
        # it.
        with suppress(FileNotFoundError):
            lock = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            wait_for_lock(lock)
            if is_at(lock, mark):
                return stage, lock
            release(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Waits until no other process puts files into place in `folder`, and makes others wait. Yields
    False if nothing can be locked here.
    """
    file = _place(folder) / f".{folder.name}.saving"
    lock = None if os.name == "nt" else _lock_file(file)
    try:
        yield os.name == "nt" or lock is not None
    finally:
        if lock is not None:
            try:
                # Processes that wait for this file find out that it is gone.
                file.unlink(missing_ok=True)
            finally:
                release(lock)


def _lock_file(file: Path) -> int | None:
    """Creates and locks a file, which the lock's owner removes; None if it cannot be locked."""
    while True:
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # for example, the file belongs to another user
            return None
        locked = wait_for_lock(lock)
        if locked and is_at(lock, file):
            return lock
        release(lock)
        if not locked:
            return None


def _prefix(folder: Path) -> str:
    return f".{folder.name}.saving-"


def _place(folder: Path) -> Path:
    """The folder for the stages and the lock: the parent if the folder may be exchanged."""
    return folder.parent if _may_exchange(folder) else folder


def _remove_leftovers(folder: Path, owned: Collection[str]) -> None:
    """Removes the stages of killed processes, in the folder and beside it."""
    prefix = _prefix(folder)
    for parent in (folder, folder.parent):
        with suppress(OSError):  # no permission to read it
            for entry in list(os.scandir(parent)):
                name = entry.name.removeprefix(prefix)
                # A stage of a folder called "<folder>.saving-x" has one more dot in its name.
                if name != entry.name and "." not in name and entry.is_dir(follow_symlinks=False):
                    with suppress(OSError):  # its own process removes it or goes on with it
                        _remove_if_left(Path(entry.path), folder, owned)


def _remove_if_left(stage: Path, folder: Path, owned: Collection[str]) -> None:
    """Removes a stage unless it is in use. The caller has locked the folder: a complete stage that
    is still there belongs to a killed process.
    """
    if not any(stage.iterdir()):
        stage.rmdir()  # it was just made: its process makes another one
        return
    try:
        lock = os.open(stage / _INCOMPLETE, os.O_RDWR)
    except FileNotFoundError:
        _discard(stage, folder, owned)
        return
    try:
        if try_lock(lock):
            _discard(stage, folder, owned)
    finally:
        release(lock)


def _discard(stage: Path, folder: Path, owned: Collection[str]) -> None:
    """Removes a stage. If its files were complete, it may be the old folder after an exchange:
    files that another program has just added to it are then moved to the new folder.
    """
    with suppress(FileNotFoundError):  # another process has removed it
        # An incomplete stage may also hold a temporary file of safetensors, under any name.
        incomplete = (stage / _INCOMPLETE).exists()
        for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _INCOMPLETE):
            if incomplete or entry.name in owned:
                entry.unlink(missing_ok=True)
            elif not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
        try:
            stage.rmdir()
        except OSError as error:
            # Another program has just added a file, or a file exists in both folders: the next
            # writer tries again.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _may_exchange(folder: Path) -> bool:
    """Whether another folder may take this one's place. All processes of a user agree on it."""
    if sys.platform != "linux" or not os.access(folder.parent, os.R_OK | os.W_OK | os.X_OK):
        return False
    here = folder.stat()
    owner = (here.st_uid, here.st_gid) == (os.geteuid(), os.getegid())
    return owner and mount_of(folder) == mount_of(folder.parent)


def _exchange(stage: Path, folder: Path) -> bool:
    """Exchanges two folders in one step; False if the system or the file system cannot, or if
    `folder` is the working directory.
    """
    with suppress(FileNotFoundError):  # the working directory was removed
        if Path.cwd() == folder:
            return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(stage), os.fsencode(folder)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
