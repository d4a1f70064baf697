"""The files of one folder replaced together: a killed process leaves the old ones or the new ones.

They are written in full into a folder beside, synced to the disk, and then renamed. What a killed
process left beside is removed by the next one that writes; a lock tells it from one at work.
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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNFINISHED = ".unfinished"  # lies in a stage until its files are whole


def replace_files(
    folder: Path,
    main: str,
    write_main: Callable[[Path], None],
    others: Mapping[str, bytes],
    owned: Collection[str],
) -> None:
    """Makes `folder` hold `main`, which `write_main(path)` writes, and `others`, {name: content}.

    Of `owned`, all names that such files can have, those that are not written go; all else in the
    folder stays. The rename of `main` is the moment from which the new ones hold.

    If only `main` changes, that is all. If others change too and the folder holds nothing else,
    the whole folder is exchanged at once, where the system can (Linux). Otherwise the others are
    removed first and put back last: whoever needs them finds none meanwhile, but never those of
    other contents.

    Raises:
        ValueError: `folder` is a file.
        OSError: the disk is full, or the like; the old files are whole then.

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
        # safetensors makes files that are their owner's alone.
        shutil.copymode(stage / _UNFINISHED, stage / main)
        _sync(stage / main)
        for name in changing:
            (stage / name).write_bytes(others[name])
            _sync(stage / name)
        (stage / _UNFINISHED).unlink()
        _sync(stage)
        if whole and _exchange(stage, folder):
            _sync(folder.parent)
            return
        for name in changing:
            (folder / name).unlink(missing_ok=True)
        (stage / main).replace(folder / main)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for name in changing:
            (stage / name).replace(folder / name)
        _sync(folder)


@contextmanager
def _staged(parent: Path, folder: Path, owned: Collection[str]) -> Iterator[Path]:
    """A new folder in `parent` that belongs to `folder`; gone, or what it was exchanged for is,
    when the block ends.
    """
    stage = Path(mkdtemp(prefix=_prefix(folder), dir=parent))
    with _locked(stage):
        try:
            # It may take the folder's place: mkdtemp's is the owner's alone.
            shutil.copymode(folder, stage)
            (stage / _UNFINISHED).touch()
            yield stage
        finally:
            _discard(stage, folder, owned)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.saving-"


@contextmanager
def _locked(stage: Path) -> Iterator[bool]:
    """Whether nobody else is at work in that folder, which is locked then."""
    if fcntl is None:
        yield True
        return
    handle = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path, owned: Collection[str]) -> None:
    """Removes what killed processes left, in the folder and beside it."""
    for parent in (folder, folder.parent):
        with suppress(OSError):  # not ours to read
            for entry in list(os.scandir(parent)):
                if entry.name.startswith(_prefix(folder)) and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError), _locked(Path(entry.path)) as alone:
                        if alone:
                            _discard(Path(entry.path), folder, owned)


def _discard(stage: Path, folder: Path, owned: Collection[str]) -> None:
    """Removes a stage. If its files were whole, it can be the former folder: what somebody else has
    just put there is kept, in the present one.
    """
    with suppress(FileNotFoundError):  # another process has cleaned up
        # Whatever safetensors, which writes beside too, has called its own file.
        unfinished = (stage / _UNFINISHED).exists()
        for entry in sorted(stage.iterdir(), key=lambda entry: entry.name == _UNFINISHED):
            if unfinished or entry.name in owned:
                entry.unlink(missing_ok=True)
            elif not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
        stage.rmdir()


def _may_exchange(folder: Path) -> bool:
    """Whether another folder may take the place of this one: it is ours, and nobody stands in it
    as far as we know.
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
    """Exchanges two folders at once; False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    directory = path.is_dir()
    if directory and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
