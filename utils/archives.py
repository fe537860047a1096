"""Download, verify and unpack zip archives, even where disk space is short.

python -m utils.archives --sha256 HEX --unpack data/COCO URL FILE.zip
"""
from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Sequence

from utils.downloads import download, forget_part, progress_bar
from utils.errors import UserError, run_main
from utils.files import PathLike
from utils.options import REQUIRED, Command, Options, option

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_MAX_FILES = 1 << 20
_MAX_RATIO = 100
"""Largest allowed unpacked size / archive size: about 1 for photos, 5 for captions; zip bombs reach 1,000."""
_MAX_SMALL = 1 << 30  # any archive may unpack to this many bytes
_CUT_BYTES = 256 * _BLOCK
"""An archive that is truncated while it is unpacked is cut in steps of at least this size."""


def unpack(archive: PathLike, folder: PathLike, progress: bool = True) -> int:
    """Unpack a zip archive into `folder` and delete the archive; return the number of files unpacked.

    Existing files of the right size are kept. Where the disk cannot hold both archive and content, the archive is
    truncated from its end as its files are unpacked; if that is interrupted, the rest of it becomes a partial download,
    which `download` completes.

    Links are unpacked as plain files that hold the names of their targets.
    Raises UserError for a damaged archive, one that unpacks to a hundred times its size or a million files, for names
    outside `folder`, and when writing fails.
    """
    archive, folder = Path(archive), Path(folder)
    part = archive.with_name(archive.name + ".part")
    try:
        with open(str(archive), "r+b") as file, zipfile.ZipFile(file) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            for member in members:
                _check_member(archive, member.filename)
            limit = max(_MAX_RATIO * archive.stat().st_size, _MAX_SMALL)
            if len(members) > _MAX_FILES or sum(member.file_size for member in members) > limit:
                raise UserError(f"{archive} unpacks to far more than it should; it is not unpacked")
            missing = [member for member in members if not _has_size(folder / member.filename, member.file_size)]
            short = shutil.disk_usage(str(archive.parent)).free < _space(missing)
            if short:
                logger.info("%s: little space is left; shortening the archive while it is unpacked", archive)
                os.replace(str(archive), str(part))
            # Last file first, so that the archive can be truncated.
            missing.sort(key=lambda member: member.header_offset, reverse=True)
            with progress_bar(len(missing), archive.name, "files", progress) as bar:
                for member in missing:
                    _unpack_member(content, member, folder)
                    bar.update(1)
                    if short and file.seek(0, os.SEEK_END) - member.header_offset > _CUT_BYTES:
                        file.truncate(member.header_offset)
        if not short:
            archive.unlink()
        forget_part(part)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, struct.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and download it again") from error
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder}: {error}") from error
    return len(missing)


def _check_member(archive: Path, name: str) -> None:
    """Raise UserError for a file that would be written outside the folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise UserError(f"{archive} holds a file with the unsafe name {name!r}; it is not unpacked")


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _space(members: Sequence[zipfile.ZipInfo]) -> int:
    """Return the bytes that unpacked files take, in whole file system blocks, plus a margin."""
    return sum(-(-member.file_size // 4096) * 4096 for member in members) + _CUT_BYTES


def _unpack_member(content: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    """Unpack one file atomically; reading to its end checks its CRC."""
    target = folder / member.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with content.open(member) as source, open(str(temporary), "wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
        os.replace(str(temporary), str(target))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


@dataclass(frozen=True)
class DownloadOptions(Options):
    """The options of this command."""

    url: str = option(REQUIRED, "what to download", positional=True, metavar="URL")
    path: str = option(REQUIRED, "file to write", positional=True, path=True, metavar="PATH")
    sha256: str | None = option(None, "expected checksum")
    size_limit: int | None = option(None, "largest size to accept, in bytes", ge=0)
    unpack: str | None = option(None, "unpack the zip archive here and delete it", path=True)


COMMAND = Command("python -m utils.archives", "Download a file, and unpack it.", DownloadOptions)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, download, unpack."""
    flags = COMMAND.parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = download(flags.url, flags.path, sha256=flags.sha256, size_limit=flags.size_limit)
    if flags.unpack:
        num_files = unpack(path, flags.unpack)
        logger.info("%s: %d files unpacked into %s", path.name, num_files, flags.unpack)


if __name__ == "__main__":
    run_main(main)
