"""Index of a webdataset shard: the headers of each tar file are read once, and the index is kept in a small file.

    index/cc3m-0123456789ab/00000.tar.index       header (JSON, one line), one record for each image, captions

A sample is the members with the same name up to the last dot, whichever program wrote the shard; `Members` says which
of them are image and captions. With the index images have random access, so training on shards is the same as on
folders: permutations, sharding over processes and workers, and exact resume. Captions are in the index itself: a run on
cached codes reads no shard.

Why not the readers of the webdataset project: `webdataset` reads shards sequentially, so a run cannot resume at the
next sample, and processes get equal numbers of samples only by repeating or dropping some. Its sibling `wids` has an
index, but does not handle damaged shards, needs a prepared list of shards and their lengths, keeps indexes as pickles
and memory-maps every shard; both need Python 3.10. Shared are the format, and the package that expands braces.
"""
from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import re
import struct
from pathlib import Path
from typing import Any, Callable, Counter, Iterator, NamedTuple

from data.folder import split_captions
from data.tar_members import BLOCK, Member, TarTrouble, Window, name_in_header, tar_members
from utils.errors import UsageError, UserError
from utils.files import IMAGE_SUFFIXES, atomic_write

logger = logging.getLogger(__name__)

_FORMAT = 2
_RECORD = struct.Struct("<QIQI")  # offset and size of the image in the shard, offset and size of its captions
_MAX_TEXT = 1 << 20
_MAX_IMAGE = 1 << 30
_MAX_OPEN = 64
_MAX_NAMES, _MAX_NAME_LEN = 20, 60

IMAGE_MEMBERS = (*IMAGE_SUFFIXES, ".img", ".image")
CAPTION_MEMBERS = ("caption", "txt", "text", "TEXT", "cap")

UNREADABLE = "shards that cannot be read"


class Skips:
    """Counts members that form no pair, by reason, with an example of each."""

    def __init__(self, counts: dict[str, Any] | None = None) -> None:
        self.counts: dict[str, list[Any]] = dict(counts or {})
        """reason -> [number, example]"""

    def add(self, reason: str, example: str, number: int = 1) -> None:
        self.counts.setdefault(reason, [0, example])[0] += number


class Members(NamedTuple):
    """Which members of a shard are images and captions."""

    images: tuple[str, ...] = IMAGE_MEMBERS
    """Suffixes of images, in lower case."""
    captions: tuple[str, ...] = CAPTION_MEMBERS
    """Keys in .json members, and suffixes (case-insensitive) of text members: the first one with a caption is used."""

    @classmethod
    def named(cls, images: str | None, captions: str | None) -> Members:
        """Return the members named by --shard-images and --shard-captions, comma-separated; None: the defaults.

        Raises UsageError.
        """

        def names(flag: str, text: str) -> list[str]:
            found = [name.strip().lstrip(".") for name in text.split(",")]
            if not all(found):
                raise UsageError(f"{flag} {text!r}: expected comma-separated names, such as img,jpg")
            return found

        usual = cls()
        return cls(
            tuple("." + name.lower() for name in names("--shard-images", images)) if images else usual.images,
            tuple(names("--shard-captions", captions)) if captions else usual.captions,
        )


class Scanned(NamedTuple):
    """The content of a shard."""

    records: list[tuple[int, int, int, int]]
    """One per image, see _RECORD. Those with captions come first, each group in the order of the shard."""
    num_pairs: int
    """Images with captions."""
    texts: bytes
    """Captions, UTF-8, those of an image separated by line breaks."""
    skips: Skips
    unread: dict[str, int]
    """Counts of other suffixes, and ("key 'url'") of keys in .json members without a caption."""


# What is in it --------------------------------------------------------------------------------------------------------


def scan(descriptor: int, size: int, shard: str, members: Members) -> Scanned:
    """Read the headers and captions of an open shard; `shard` is its name in examples. Raises OSError."""
    skips = Skips()
    unread: Counter[str] = collections.Counter()
    images: dict[str, Member] = {}
    captions: dict[str, dict[str, tuple[str, str]]] = {}  # key -> name in `members` -> (captions, problem)
    names = {"." + name.lower(): name for name in reversed(members.captions)}
    window = Window(descriptor)
    try:
        for member in tar_members(window.read, size):
            key, suffix = os.path.splitext(member.name)
            suffix = suffix.lower()
            while key.startswith("./"):  # only some of a sample's members may have it, if different programs added them
                key = key[2:]
            if os.path.basename(key).startswith("."):
                continue
            if suffix in members.images:
                if key in images or member.size > _MAX_IMAGE:
                    reason = "images of 1 GB and more" if member.size > _MAX_IMAGE else "images of a name used before"
                    skips.add(reason, f"{shard}/{member.name}")
                else:
                    images[key] = member
            elif suffix in names or suffix == ".json":
                found = captions.setdefault(key, {})
                if member.size > _MAX_TEXT:
                    found.setdefault(suffix, ("", "captions of 1 MB and more"))
                elif suffix == ".json":
                    for name, text in _json_captions(window.read(member.offset, member.size), members, unread):
                        found[name] = text
                else:
                    text = split_captions(window.read(member.offset, member.size))
                    if not found.get(names[suffix], ("", ""))[0]:  # a key of a .json member has priority
                        found[names[suffix]] = text
            else:
                _count(unread, suffix)
    except TarTrouble as trouble:
        skips.add(str(trouble), shard)
    paired, bare, texts = [], [], bytearray()
    for key, member in images.items():
        found = captions.pop(key, {})
        # Unlike a .json member, a .txt member cannot express line breaks in a caption.
        text = next((found[name][0] for name in members.captions if name in found and found[name][0]), "")
        if text:
            content = text.encode("utf-8", "replace")
            paired.append((member.offset, member.size, len(texts), len(content)))
            texts += content
            continue
        bare.append((member.offset, member.size, 0, 0))
        problem = next((problem for _, problem in found.values()), "images without captions")
        skips.add(problem, f"{shard}/{member.name}")
    if captions:
        skips.add("captions without an image", f"{shard}/{min(captions)}", len(captions))
    return Scanned(paired + bare, len(paired), bytes(texts), skips, dict(unread))


def _count(unread: Counter[str], name: str) -> None:
    name = name[:_MAX_NAME_LEN]
    if name in unread or len(unread) < _MAX_NAMES:
        unread[name] += 1


def _json_captions(content: bytes, members: Members, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (name, (captions joined by line breaks, "")) of a .json member, or ("json", ("", problem))."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        yield "json", ("", "json files that cannot be read")
        return
    values, captions = values if isinstance(values, dict) else {}, 0
    for name in members.captions:
        value = values.get(name)
        lines = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        lines = [" ".join(line.split()) for line in lines if isinstance(line, str) and line.strip()]
        if lines:
            captions += 1
            yield name, ("\n".join(lines), "")
    if not captions:
        for key in values:
            _count(unread, f"key '{key}'")
        yield "json", ("", "json files without a caption")


# The index ------------------------------------------------------------------------------------------------------------


class OpenFiles:
    """Descriptors of recently read files, in this process: thousands of shards cannot all be open."""

    def __init__(self) -> None:
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": collections.OrderedDict()}

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, path: str, offset: int, size: int, check: Callable[[int], bool]) -> bytes:
        """Return bytes of a file. Raises UserError when `check` fails because the file was replaced, and OSError.

        check(descriptor): called when the file is opened.
        """
        # Not memory-mapped: a truncated file or a bad disk would kill the process.
        return os.pread(self._descriptor(path, check), size, offset)

    def read_ahead(self, path: str, offset: int, size: int, check: Callable[[int], bool]) -> None:
        """Ask the system to prefetch this part of a file. Raises like `read`."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(path, check), offset, size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, path: str, check: Callable[[int], bool]) -> int:
        descriptor = self._open.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if not check(descriptor):
                os.close(descriptor)
                raise UserError(f"{path} changed while it was in use; start again (with --resume)")
            self._open[path] = descriptor
            if len(self._open) > _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return descriptor


class ShardIndex:
    """Offsets of the images and captions of a shard. Mostly on disk: only the header is in memory."""

    def __init__(self, shard: str, header: bytes, file: str | None, body: bytes = b"") -> None:
        """header: as in the file. body: the rest, if there is no file."""
        self.shard, self.file, self._header, self._body = shard, file, header, body
        self.problem = ""
        """Why the file could not be written, or ""."""
        values = json.loads(header)
        self.size, self.mtime_ns = int(values["size"]), int(values["mtime_ns"])
        self.num_pairs, self.num_images = int(values["pairs"]), int(values["images"])
        self.skips = Skips(values["skipped"])
        self.unread: dict[str, int] = values.get("unread", {})
        self.body_size = self.num_images * _RECORD.size + int(values["texts"])

    def captions(self, image: int, files: OpenFiles) -> str:
        """Return the captions of one of the first `num_pairs` images, joined by line breaks."""
        _, _, start, size = self._record(image, files)
        return self._read(self.num_images * _RECORD.size + start, size, files).decode("utf-8")

    def content(self, image: int, files: OpenFiles) -> bytes:
        """Return an image's file content. Raises OSError if the shard cannot be read, UserError if it changed."""
        offset, size, _, _ = self._record(image, files)
        return files.read(self.shard, offset, size, self._is_same_shard)

    def offsets(self, files: OpenFiles) -> list[int]:
        """Return the offset of each image in the shard."""
        records = self._read(0, self.num_images * _RECORD.size, files)
        return [offset for offset, _, _, _ in _RECORD.iter_unpack(records)]

    def read_ahead(self, first: int, last: int, files: OpenFiles) -> None:
        """Prefetch the part of the shard from the first to the last image. Raises like `content`."""
        start, _, _, _ = self._record(first, files)
        offset, size, _, _ = self._record(last, files)
        files.read_ahead(self.shard, start, offset + size - start, self._is_same_shard)

    def name(self, image: int, files: OpenFiles) -> str:
        """Return shard and name of an image, for messages; a name of more than 100 bytes may be truncated."""
        try:
            header = files.read(self.shard, self._record(image, files)[0] - BLOCK, BLOCK, self._is_same_shard)
            return f"{self.shard}/{name_in_header(header)}"
        except (OSError, UserError):
            return f"image {image} of {self.shard}"

    def _record(self, image: int, files: OpenFiles) -> tuple[int, int, int, int]:
        return _RECORD.unpack(self._read(image * _RECORD.size, _RECORD.size, files))  # type: ignore[return-value]

    def _read(self, offset: int, size: int, files: OpenFiles) -> bytes:
        if self.file is None:
            return self._body[offset : offset + size]
        content = files.read(self.file, len(self._header) + offset, size, self._is_same_index)
        if len(content) < size:
            raise UserError(f"{self.file} was truncated while it was in use; delete it and start again")
        return content

    def _is_same_shard(self, descriptor: int) -> bool:
        found = os.fstat(descriptor)
        return (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)

    def _is_same_index(self, descriptor: int) -> bool:
        return os.pread(descriptor, len(self._header), 0) == self._header


def open_index(shard: str, folder: Path, members: Members) -> ShardIndex:
    """Return the index of a shard: from its file in `folder`, or by reading the shard if there is no valid one.

    It is written atomically, so several processes may do this concurrently; at worst they do the same work. If the file
    cannot be written, the index stays in memory. An unreadable shard has no images.
    """
    file = _index_file(shard, folder, members)
    try:
        descriptor = os.open(shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return _without_images(shard)
    try:
        found = os.fstat(descriptor)
        stored = _stored(shard, file, found)
        if stored is not None:
            return stored
        scanned = scan(descriptor, found.st_size, os.path.basename(shard), members)
    except OSError:
        return _without_images(shard)
    finally:
        os.close(descriptor)
    header, body = _encoded(shard, found, scanned)
    try:
        with atomic_write(file, "wb") as output:
            output.write(header + body)
    except OSError as error:
        index = ShardIndex(shard, header, None, body)
        index.problem = error.strerror or str(error)
        return index
    return ShardIndex(shard, header, str(file))


def _index_file(shard: str, folder: Path, members: Members) -> Path:
    parent, name = os.path.split(os.path.realpath(shard))
    digest = hashlib.sha256(parent.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(parent))[:60]
    named = "" if members == Members() else "." + hashlib.sha256(repr(members).encode("utf-8")).hexdigest()[:8]
    return folder / f"{readable}-{digest}" / f"{name}{named}.index"


def _stored(shard: str, file: Path, found: os.stat_result) -> ShardIndex | None:
    """Return the index in a file, if it is complete and matches the shard's current state."""
    try:
        with open(str(file), "rb") as stored:
            header = stored.readline(_MAX_TEXT)
            size = os.fstat(stored.fileno()).st_size
        if json.loads(header)["format"] != _FORMAT:
            return None
        index = ShardIndex(shard, header, str(file))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = (index.size, index.mtime_ns) == (found.st_size, found.st_mtime_ns)
    return index if same and size == len(header) + index.body_size else None


def _encoded(shard: str, found: os.stat_result, scanned: Scanned) -> tuple[bytes, bytes]:
    values = {
        "format": _FORMAT,
        "shard": os.path.realpath(shard),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "pairs": scanned.num_pairs,
        "images": len(scanned.records),
        "texts": len(scanned.texts),
        "skipped": scanned.skips.counts,
        "unread": scanned.unread,
    }
    records = b"".join(_RECORD.pack(*record) for record in scanned.records)
    return json.dumps(values).encode("ascii") + b"\n", records + scanned.texts


def _without_images(shard: str) -> ShardIndex:
    skips = Skips({UNREADABLE: [1, os.path.basename(shard)]})
    values = {"size": 0, "mtime_ns": 0, "pairs": 0, "images": 0, "texts": 0, "skipped": skips.counts}
    return ShardIndex(shard, json.dumps(values).encode("ascii") + b"\n", None)
