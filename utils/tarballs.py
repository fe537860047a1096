"""Tar archives from the web, unpacked without trusting their names: only plain files and folders, only inside."""

import contextlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import List

from utils.errors import UserError
from utils.files import PathLike

_BLOCK = 1 << 20
_MAX_FILES = 10000


def unpack_tar(archive: PathLike, folder: PathLike, size_limit: int) -> None:
    """Unpack an archive whose content is one top folder, as `folder`, and delete the archive.

    The content is unpacked under another name first: `folder` exists complete or not at all. Links, devices, absolute
    names, names with "..", and content of more than `size_limit` bytes are refused.
    Raises UserError for such archives, damaged ones, and when writing fails.
    """
    archive, folder = Path(archive), Path(folder)
    temporary = folder.with_name(".{}.{}.tmp".format(folder.name, os.getpid()))
    try:
        _extract(archive, temporary, size_limit)
        tops = list(temporary.iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise UserError("{} holds {} things at its top, not one folder".format(archive, len(tops)))
        if not folder.is_dir():  # another process may have been faster
            os.replace(str(tops[0]), str(folder))
        with contextlib.suppress(FileNotFoundError):
            archive.unlink()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError("{} is damaged ({}); delete it and fetch it again".format(archive, error)) from error
    except OSError as error:
        raise UserError("cannot unpack {} into {}: {}".format(archive, folder, error)) from error
    finally:
        shutil.rmtree(str(temporary), ignore_errors=True)


def _extract(archive: Path, target: Path, size_limit: int) -> None:
    size = 0
    target.mkdir(parents=True)
    with tarfile.open(str(archive), "r:*") as content:
        for number, member in enumerate(content):
            if number >= _MAX_FILES:
                raise UserError("{} holds more than {} files".format(archive, _MAX_FILES))
            path = target.joinpath(*_safe_parts(archive, member))
            size += member.size
            if size > size_limit:
                raise UserError("{} unpacks to more than the {} bytes expected".format(archive, size_limit))
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            source = content.extractfile(member)
            if source is None:
                raise UserError("{} holds {!r} without content".format(archive, member.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(str(path), "xb") as file:
                shutil.copyfileobj(source, file, _BLOCK)


def _safe_parts(archive: Path, member: tarfile.TarInfo) -> List[str]:
    """The parts of a member's name. Raises UserError for what is no plain file or folder inside the archive."""
    pure = PurePosixPath(member.name)
    unsafe = pure.is_absolute() or ".." in pure.parts or "\\" in member.name or ":" in member.name
    if unsafe or not (member.isreg() or member.isdir()):
        raise UserError("{} holds the unsafe entry {!r}; it is not unpacked".format(archive, member.name))
    return list(pure.parts)
