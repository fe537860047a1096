"""Unpack untrusted tar archives: only regular files and folders, only inside the target folder."""
from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from utils.errors import UserError
from utils.files import PathLike

_MAX_FILES = 10000


def unpack_tar(archive: PathLike, folder: PathLike, size_limit: int) -> None:
    """Unpack an archive with one top-level folder as `folder`, and delete the archive.

    The content is unpacked under a temporary name first, so `folder` is never partial. Links, devices, absolute
    names, names with "..", and content of more than `size_limit` bytes are refused.
    Raises UserError for such archives, damaged ones, and when writing fails.
    """
    archive, folder = Path(archive), Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _extract(archive, temporary, size_limit)
        tops = list(temporary.iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise UserError(f"{archive} has {len(tops)} top-level entries, not one folder")
        if not folder.is_dir():  # another process may have been faster
            os.replace(str(tops[0]), str(folder))
        with contextlib.suppress(FileNotFoundError):
            archive.unlink()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder}: {error}") from error
    finally:
        shutil.rmtree(str(temporary), ignore_errors=True)


def _extract(archive: Path, target: Path, size_limit: int) -> None:
    size = 0
    target.mkdir(parents=True)
    with tarfile.open(str(archive), "r:*") as content:
        # A second line of defence: it accepts links, strips "/" from names, and Python 3.8 may lack it.
        content.extraction_filter = getattr(tarfile, "data_filter", None)  # type: ignore[assignment]
        for number, member in enumerate(content):
            if number >= _MAX_FILES:
                raise UserError(f"{archive} holds more than {_MAX_FILES} files")
            parts = PurePosixPath(member.name).parts
            unsafe = member.name.startswith("/") or ".." in parts or "\\" in member.name or ":" in member.name
            path = target.joinpath(*parts)
            if unsafe or not (member.isreg() or member.isdir()) or path.is_file():  # a duplicate
                raise UserError(f"{archive} holds the unsafe entry {member.name!r}; it is not unpacked")
            size += member.size
            if size > size_limit:
                raise UserError(f"{archive} unpacks to more than the {size_limit} bytes expected")
            if member.isdir():  # without the filter, tarfile would make a private folder
                path.mkdir(parents=True, exist_ok=True)
            else:
                content.extract(member, str(target), set_attrs=False)
