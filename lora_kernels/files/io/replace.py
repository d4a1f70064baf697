"""Replaces the files of a folder together: a killed process leaves the old ones or the new ones.

The new files are written to a temporary folder (a stage), synced to the disk, and then renamed. The
next writer removes the stages of killed processes; a lock protects the stages that are in use.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from .disk import sync, try_lock

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_INCOMPLETE = ".unfinished"  # in a stage until its files are complete


def replace_files(
    folder: Path,
    main: str,
    write_main: Callable[[Path], None],
    others: Mapping[str, bytes],
    owned: Collection[str],
) -> None:
    """Replaces the files in `folder` by `main`, written by `write_main(path)`, and `others`,
    {name: content}.

    Existing files with a name in `owned` that are not written again are removed; all others stay.
    The rename of `main` is the moment at which the new files take effect.

    If only `main` changes, it is the only rename. If others change too and the folder holds only
    `owned` files, the whole folder is exchanged in one step where the system can (Linux).
    Otherwise the others are removed first and renamed into place last: a reader may find them
    missing meanwhile, but never with contents that do not belong to `main`.

    Raises:
        ValueError: `folder` is a file.
        OSError: the disk is full, for example; the old files are intact then.

    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    _remove_leftovers(folder, owned)
    present = {entry.name for entry in folder.iterdir()}
    stale = present.intersection(owned).difference([main, *others])
    same = not stale and all(
        name in present and (folder / name).read_bytes() == content
        for name, content in others.items()
    )
    changing = () if same else tuple(others)
    whole = not same and present.issubset(owned) and _may_exchange(folder)
    with _staged(folder.parent if whole else folder, folder, owned) as stage:
        write_main(stage / main)
        # safetensors makes files that only their owner can read.
        shutil.copymode(stage / _INCOMPLETE, stage / main)
        sync(stage / main)
        for name in changing:
            (stage / name).write_bytes(others[name])
            sync(stage / name)
        (stage / _INCOMPLETE).unlink()
        sync(stage)
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
def _staged(parent: Path, folder: Path, owned: Collection[str]) -> Iterator[Path]:
    """A new folder in `parent` for the files of `folder`. It is removed at the end of the block; if
    it was exchanged for the old folder, that is removed.
    """
    stage = Path(mkdtemp(prefix=_prefix(folder), dir=parent))
    with _locked(stage):
        try:
            # It may take the folder's place, and mkdtemp lets only the owner read it.
            shutil.copymode(folder, stage)
            (stage / _INCOMPLETE).touch()
            yield stage
        finally:
            _discard(stage, folder, owned)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.saving-"


@contextmanager
def _locked(stage: Path) -> Iterator[bool]:
    """Locks a stage; False if another process is using it."""
    if os.name == "nt":
        yield True
        return
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path, owned: Collection[str]) -> None:
    """Removes the stages of killed processes, in the folder and beside it."""
    for parent in (folder, folder.parent):
        with suppress(OSError):  # no permission to read it
            for entry in list(os.scandir(parent)):
                if entry.name.startswith(_prefix(folder)) and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError), _locked(Path(entry.path)) as alone:
                        if alone:
                            _discard(Path(entry.path), folder, owned)


def _discard(stage: Path, folder: Path, owned: Collection[str]) -> None:
    """Removes a stage. If its files were complete, it may be the old folder after an exchange: then
    files that another process has just added to it are moved to the present folder.
    """
    with suppress(FileNotFoundError):  # another process has cleaned up
        # Then it may also hold a temporary file of safetensors, under any name.
        incomplete = (stage / _INCOMPLETE).exists()
        for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _INCOMPLETE):
            if incomplete or entry.name in owned:
                entry.unlink(missing_ok=True)
            elif not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
        stage.rmdir()


def _may_exchange(folder: Path) -> bool:
    """Whether another folder may take the place of this one: this process's user owns it, and it is
    not the working directory.
    """
    if sys.platform != "linux" or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    here, above = folder.stat(), folder.parent.stat()
    with suppress(FileNotFoundError):
        if Path.cwd() == folder:
            return False
    owner = (here.st_uid, here.st_gid) == (os.geteuid(), os.getegid())
    return owner and here.st_dev == above.st_dev and not os.path.ismount(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
