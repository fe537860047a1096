"""Values from untrusted files: truncated for messages, numbers bounded, archives checked."""

from __future__ import annotations

import reprlib
import zipfile
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import PathLike

ZIP_MAGIC = b"PK\x03\x04"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """A value or name from an untrusted file, truncated for a message: nested references could print without end."""
    return _SHORT.repr(value)


def is_number(value: Any) -> bool:
    """Whether an option's value is a plain number of a reasonable size (not NaN, not infinite, not negative)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def check_archive(path: PathLike) -> None:
    """Check a file that torch.save may have written; one that is not an archive (torch before 1.6) passes.

    Raises UserError for a damaged archive, and for a compressed one: torch writes none, and they can be bombs.
    """
    with open(str(path), "rb") as file:
        start = file.read(len(ZIP_MAGIC))
    if start == ZIP_MAGIC:
        verify_zip(Path(path))


def verify_zip(path: Path) -> None:
    """Compare every entry's CRC. Raises UserError for a damaged or a compressed archive."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(str(path)) as archive:
            entries = archive.infolist()
            # torch.save compresses nothing, so a file never unpacks to more than itself.
            bomb = (
                any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or sum(e.file_size for e in entries) > size
            )
            bad = None if bomb else archive.testzip()
    except Exception as error:  # a damaged archive raises almost anything: BadZipFile, EOFError, struct.error, ...
        raise UserError(
            f"checkpoint {path} is damaged or incomplete ({error}); use another one, or copy it again"
        ) from error
    if bomb:
        raise UserError(f"{path} is a compressed archive, which torch.save does not write; it was not opened")
    if bad is not None:
        raise UserError(f"checkpoint {path} is damaged (checksum of {shown(bad)}); use another one, or copy it again")
