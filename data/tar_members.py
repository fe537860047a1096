"""Lists the members of a tar file and their offsets, from its headers alone, up to the first invalid one."""
from __future__ import annotations

import os
import re
from typing import Callable, Iterator, NamedTuple

BLOCK = 512
"""Bytes of a header; contents are padded to a multiple of this."""

_WINDOW = 8192
_MAX_HEADER = 1 << 20
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")

TRUNCATED = "truncated shards, used up to that point"
DAMAGED = "damaged shards, used up to that point"
NO_TAR = "shards that are not tar files"
COMPRESSED = "compressed shards (decompress them: they have no random access)"


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int
    size: int


class TarTrouble(Exception):
    """Why the tar file cannot be read further."""


def tar_members(read: Callable[[int, int], bytes], end: int) -> Iterator[Member]:
    """Yield the regular files of a tar file; raises TarTrouble where it is truncated or invalid.

    read(offset, size): bytes, fewer at the end of the file. end: size of the file.

    tarfile of the standard library takes 0.1 ms for each of the three members of a sample, an hour for the 12 million
    samples of CC12M; this takes a third of that. Supports the formats that tarfile writes: ustar, GNU and pax.
    """
    offset = 0
    name: str | None = None
    size: int | None = None
    while True:
        block = read(offset, BLOCK)
        if len(block) < BLOCK:
            raise TarTrouble(TRUNCATED if offset else NO_TAR)
        if not block.strip(b"\0"):
            return
        kind, length = _checked_header(block, offset)
        data = offset + BLOCK
        if kind in (b"x", b"g", b"L", b"K"):  # metadata of the next member
            if length > _MAX_HEADER:
                raise TarTrouble(DAMAGED)
            content = read(data, length)
            if len(content) < length:
                raise TarTrouble(TRUNCATED)
            if kind == b"L":
                name = content.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == b"x":
                name, size = _pax_values(content, name, size)
            offset = data + -(-length // BLOCK) * BLOCK
            continue
        if kind == b"S":
            raise TarTrouble("shards with sparse files, used up to that point")
        length = length if size is None else size
        if kind in (b"0", b"\0", b"7"):
            if data + length > end:
                raise TarTrouble(TRUNCATED)
            yield Member(name_in_header(block) if name is None else name, data, length)
        # Links, folders and devices have no content, whatever their size field says.
        offset = data if kind in b"123456" else data + -(-length // BLOCK) * BLOCK
        if offset > end:
            raise TarTrouble(TRUNCATED)
        name = size = None


def _checked_header(block: bytes, offset: int) -> tuple[bytes, int]:
    """Return (type, size) of a header block."""
    try:
        checksum = int(block[148:156].strip(b"\0 ") or b"-1", 8)
        field = block[124:136]
        length = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        checksum, length = -1, 0
    if checksum != sum(block) - sum(block[148:156]) + 8 * 0x20 or length < 0:
        if offset:
            raise TarTrouble(DAMAGED)
        known = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
        raise TarTrouble(COMPRESSED if block.startswith(known) else NO_TAR)
    return block[156:157], length


def name_in_header(block: bytes) -> str:
    """Return the name in a header block; a long name (see `tar_members`) is truncated there."""
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":  # GNU uses this field otherwise
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax_values(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Return name and size of the next member from a pax header, otherwise those given."""
    start = 0
    while start < len(content):
        match = _PAX_RECORD.match(content, start)
        end = start + int(match.group(1)) if match else 0
        if match is None or end <= match.end():
            break
        value = content[match.end() : end - 1]
        if match.group(2) == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif match.group(2) == b"size" and value.isdigit() and len(value) <= 20:
            size = int(value)
        start = end
    return name, size


class Window:
    """Reads a file in larger blocks, so that adjacent headers take one call."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.start, self.data = descriptor, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        first = offset - self.start
        if first < 0 or first + size > len(self.data):
            first, self.start = 0, offset
            self.data = os.pread(self.descriptor, max(size, _WINDOW), offset)
        return self.data[first : first + size]
