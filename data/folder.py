"""Image-caption pairs of a folder: images and text files anywhere below it, paired by file stem.

    data/COCO/train2017/000000000009.jpg                photos/cat/1.png
    data/COCO/train2017_captions/000000000009.txt       captions/cat/1.txt       one caption per line

The listing also reads the caption files (some seconds for COCO's 118,000), so that empty ones are found before training
starts. Images are not opened: that would take many minutes.
"""
from __future__ import annotations

import array
import collections
import concurrent.futures
import logging
import os
from typing import Counter, Iterable, Iterator, NamedTuple, Sequence

from utils.errors import UserError
from utils.files import IMAGE_SUFFIXES, TEXT_SUFFIXES, open_regular
from utils.skipped import Entry, SkipReport

logger = logging.getLogger(__name__)

_MAX_TEXT_BYTES = 1 << 20
"""A caption file larger than this is a mistake."""
_SHOWN_SUFFIXES = 8
_READERS = 8
_FILES_PER_TASK = 256


class PackedStrings:
    """A read-only list of strings in one block of bytes.

    COCO's 591,753 captions take 36 MB this way instead of 90 MB, and forked loader processes keep sharing them: reading
    a list's strings would copy their memory pages to each process, because of the reference counts.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array.array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        # surrogateescape: file names are bytes on some systems and need not be UTF-8.
        self._bytes += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class Skipped(NamedTuple):
    """Files that form no pair: number, reason and an example."""

    num_files: int
    reason: str
    example: str

    def __str__(self) -> str:
        return f"{self.num_files} {self.reason} (such as {self.example})"


class FolderPairs(NamedTuple):
    """The good pairs of a folder, ordered by the path of the image."""

    folder: str
    images: PackedStrings
    """Paths of the images."""
    captions: PackedStrings
    """For each image its captions, joined by line breaks, without blank lines."""
    skipped: list[Skipped]
    num_bad: int = 0
    """Unusable pairs. (Files without a partner do not count: COCO has many.)"""
    unread: str = ""
    """The types of other files: "3 *.heic, 1 *.json"."""

    def report(self) -> str:
        """Return one line: how many pairs there are and what was skipped."""
        return f"{self.folder}: {len(self.images)} pairs of image and captions" + "".join(
            f"; skipped {skipped}" for skipped in self.skipped_files()
        )

    def skipped_files(self) -> list[str]:
        """Return what was skipped; if texts lack images, also other file types, which may be the images."""
        others = f"files of types that are not read: {self.unread}"
        alone = self.unread and any(skipped.reason == _NO_IMAGE for skipped in self.skipped)
        return [*map(str, self.skipped), *([others] if alone else [])]


def listed_suffixes(counts: Counter[str]) -> str:
    """Return "3 *.heic, 1 *.json": the most frequent suffixes, and how often they occur."""
    names = [f"{count} *{suffix}" for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return ", ".join(names[:_SHOWN_SUFFIXES] + ["..."] * (len(names) > _SHOWN_SUFFIXES))


_NO_CAPTIONS, _NO_IMAGE, _NO_FOLDER = "images without captions", "text files without an image", "unreadable folders"
_UNUSED = (_NO_CAPTIONS, _NO_IMAGE)
"""Skipped without counting as bad pairs."""


def list_pairs(folder: str, report: SkipReport | None = None) -> FolderPairs:
    """Find the pairs below `folder`; other files are added to `report`.

    A text belongs to the image of the same stem: in the same folder, otherwise in a folder of the same name
    (images/cat/1.png, captions/cat/1.txt), otherwise the only one of that stem in the whole tree. Images with several
    candidates are ambiguous and skipped, as are images without a text, texts without an image, and texts that are
    empty, larger than 1 MiB, not UTF-8 or with NUL bytes. Hidden files and folders are ignored.

    Raises UserError when the folder does not exist or has no pairs, or when `report` has too many bad ones.
    """
    source = f"--input-folder {folder}" if report is None else report.source
    if not os.path.isdir(folder):
        raise UserError(
            f"{source}: no such folder; give one with images and captions, or 'demo' for the built-in set"
        )
    skipped: dict[str, list[str]] = {}
    unread: Counter[str] = collections.Counter()
    images, texts = list_files(folder, skipped, unread)
    chosen = sorted(_match(images, texts, skipped))
    pairs = FolderPairs(folder, PackedStrings(), PackedStrings(), [], unread=listed_suffixes(unread))
    for (image, text), (captions, problem) in zip(chosen, _read_all([text for _, text in chosen])):
        if problem:
            skipped.setdefault(problem, []).append(text)
        else:
            pairs.images.append(image)
            pairs.captions.append(captions)
    pairs.skipped.extend(
        Skipped(len(paths), reason, os.path.relpath(min(paths), folder)) for reason, paths in sorted(skipped.items())
    )
    bad = [Entry(path, reason) for reason, paths in skipped.items() if reason not in _UNUSED for path in sorted(paths)]
    if report is not None:
        report.add_all(bad, everywhere=True)
        report.add_unused(Entry(path, reason) for reason in _UNUSED for path in sorted(skipped.get(reason, ())))
    if not len(pairs.images):
        raise UserError(_nothing_found(source, images, texts, pairs))
    if report is not None:
        report.check(len(pairs.images) + len(bad))
    return pairs._replace(num_bad=len(bad))


def _nothing_found(source: str, images: list[str], texts: list[str], pairs: FolderPairs) -> str:
    why = "; ".join(pairs.skipped_files())
    why = f"; not read: {pairs.unread}" if pairs.unread and not why else why and f": {why}"
    return (
        f"{source}: no pair of image and captions among {len(images)} images and {len(texts)} text files below it"
        f"{why}; expected images ({starred(IMAGE_SUFFIXES)}) and, with the same stem, .txt files with one caption per "
        "line, e.g. train2017/000000000009.jpg and train2017_captions/000000000009.txt. For captions in one list "
        "(COCO, Karpathy, Flickr8k, metadata.jsonl, CSV, TSV), python data/process_trainset.py --captions LIST "
        "--out-dir FOLDER makes them"
    )


def starred(suffixes: Iterable[str]) -> str:
    """Return "*.jpg *.png"."""
    return " ".join("*" + suffix for suffix in suffixes)


def list_files(
    folder: str, skipped: dict[str, list[str]] | None = None, unread: Counter[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return the paths of all images and of all text files below `folder`.

    Unreadable folders go to `skipped`; the suffixes of all other files are counted in `unread`.
    """
    images: list[str] = []
    texts: list[str] = []
    for path in _walk(folder, {} if skipped is None else skipped):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix in TEXT_SUFFIXES:
            texts.append(path)
        elif unread is not None:
            unread[suffix] += 1
    return images, texts


def _walk(folder: str, skipped: dict[str, list[str]]) -> Iterator[str]:
    """Yield the files below `folder`, also through symbolic links (each real folder once, so that loops end).

    Iterative, unlike os.walk before Python 3.12, which can exceed the recursion limit.
    """
    seen = set()
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        folders: list[str] = []
        try:
            found = os.stat(parent)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        folders.append(entry.path)
                    else:
                        yield entry.path
        except OSError:
            skipped.setdefault(_NO_FOLDER, []).append(parent)
        waiting.extend(sorted(folders, reverse=True))  # the first one is taken next


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into itself
        return False


def _match(images: list[str], texts: list[str], skipped: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield (image, text) and add all other files to `skipped` (reason -> paths)."""
    unused: dict[str, str] = {}  # path without suffix -> text
    for text in sorted(texts, key=lambda text: _rank(text, TEXT_SUFFIXES)):
        unused.setdefault(_without_suffix(text), text)
    by_stem: dict[str, list[str]] = {}
    by_folder: dict[tuple[str, ...], list[str]] = {}  # (name of the folder, stem)
    for place in unused:
        by_stem.setdefault(os.path.basename(place), []).append(place)
        by_folder.setdefault(_last(place, 2), []).append(place)

    elsewhere, all_texts = [], set(unused)
    for image in sorted(images, key=lambda image: (_without_suffix(image), _rank(image, IMAGE_SUFFIXES))):
        if _without_suffix(image) in unused:
            yield image, unused.pop(_without_suffix(image))
        elif _without_suffix(image) in all_texts:  # the same image in another format
            skipped.setdefault(_NO_CAPTIONS, []).append(image)
        else:
            elsewhere.append(image)

    alone = []
    for image in elsewhere:
        candidates = [text for text in by_folder.get(_last(_without_suffix(image), 2), ()) if text in unused]
        found = _closest(_without_suffix(image), candidates)
        if found is None:
            alone.append(image)
        else:
            yield image, unused.pop(found)

    ambiguous: set[str] = set()
    for image in alone:
        candidates = by_stem.get(_stem(image), [])
        left = [text for text in candidates if text in unused]
        if len(candidates) == 1 and left:
            yield image, unused.pop(left[0])
        elif len(candidates) == 1:
            skipped.setdefault("images whose captions belong to another image of the same name", []).append(image)
        elif left:
            skipped.setdefault("images with several caption files of their name", []).append(image)
            ambiguous.update(left)
        else:
            skipped.setdefault(_NO_CAPTIONS, []).append(image)
    without_image = [text for place, text in unused.items() if place not in ambiguous]
    if without_image:
        skipped[_NO_IMAGE] = without_image


def _without_suffix(path: str) -> str:
    """Return a path without its suffix."""
    return os.path.splitext(path)[0]


def _stem(path: str) -> str:
    return os.path.basename(_without_suffix(path))


def _rank(path: str, suffixes: Sequence[str]) -> int:
    return suffixes.index(os.path.splitext(path)[1].lower())


def _last(place: str, count: int) -> tuple[str, ...]:
    """Return the last parts of a path."""
    return tuple(place.split(os.sep)[-count:])


def _closest(place: str, candidates: list[str]) -> str | None:
    """Return the candidate that shares most trailing path parts with `place`; None if there is no single one."""
    count = 2
    while len(candidates) > 1 and count <= place.count(os.sep):
        count += 1
        candidates = [text for text in candidates if _last(text, count) == _last(place, count)]
    return candidates[0] if len(candidates) == 1 else None


def _read_all(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield `_read_captions` of each path, in order, several at a time: cold and network disks have high latency."""
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as executor:
        for results in executor.map(lambda task: [_read_captions(path) for path in task], tasks):
            yield from results


def _read_captions(path: str) -> tuple[str, str]:
    """Return (captions joined by line breaks, "") or ("", the problem with the file)."""
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except OSError:
        return "", "caption files that cannot be read"
    return split_captions(content)


def split_captions(content: bytes) -> tuple[str, str]:
    """Return (captions joined by line breaks, "") of a caption file's content, or ("", the problem with it)."""
    if len(content) > _MAX_TEXT_BYTES:
        return "", "caption files of more than 1 MiB"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "", "caption files that are not UTF-8"
    if "\0" in text:  # binary, or UTF-16
        return "", "caption files with NUL bytes"
    # Not splitlines(), which also splits at U+2028 and the like; a byte order mark is not part of the caption.
    lines = text.lstrip("\ufeff").replace("\r", "\n").split("\n")
    captions = [line.strip() for line in lines if line.strip()]
    return "\n".join(captions), "" if captions else "empty caption files"
