"""Which image belongs to which captions: images and text files anywhere below a folder, paired by file stem.

    data/COCO/train2017/000000000009.jpg
    data/COCO/train2017_captions/000000000009.txt       one caption per line

The listing also reads the caption files (some seconds for COCO's 118,000), so that empty ones are known before training
starts. Images are not opened here: that would take many minutes.
"""

import array
import concurrent.futures
import logging
import os
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from data.images import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.files import open_regular
from utils.skipped import Entry, SkipReport

logger = logging.getLogger(__name__)

_TEXT_SUFFIX = ".txt"
_MAX_TEXT_BYTES = 1 << 20
"""A caption file is larger than this only by mistake."""
_READERS = 8
_FILES_PER_TASK = 256


class PackedStrings:
    """A read-only list of strings in one block of bytes.

    COCO's 591,753 captions take 36 MB this way instead of 90 MB, and loader processes that are forked share them for
    good: touching a list's strings would copy their memory pages to each process, through the reference counts.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array.array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        # surrogateescape: names of files are bytes on some systems and need not be UTF-8.
        self._bytes += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class Skipped(NamedTuple):
    """Files that make no pair: how many, for what reason, and one of them."""

    num_files: int
    reason: str
    example: str

    def __str__(self) -> str:
        return "{} {} (such as {})".format(self.num_files, self.reason, self.example)


class FolderPairs(NamedTuple):
    """The good pairs of a folder, ordered by the path of the image."""

    folder: str
    images: PackedStrings
    """Paths of the images."""
    captions: PackedStrings
    """For each image its captions, joined by line breaks, without blank lines."""
    skipped: List[Skipped]
    num_bad: int = 0
    """Pairs that are there but cannot be used. (Files without a partner are none: COCO has many.)"""

    def report(self) -> str:
        """Return one line: how many pairs there are and what was left out."""
        line = "{}: {} pairs of image and captions".format(self.folder, len(self.images))
        return line + "".join("; skipped {}".format(skipped) for skipped in self.skipped)


_NO_CAPTIONS, _NO_IMAGE, _NO_FOLDER = "images without captions", "text files without an image", "unreadable folders"
_UNUSED = (_NO_CAPTIONS, _NO_IMAGE)
"""What is left out without being a bad pair."""


def list_pairs(folder: str, report: Optional[SkipReport] = None) -> FolderPairs:
    """Find the pairs below `folder`; what makes none goes to `report`, too.

    A text belongs to the image of the same stem: to the one beside it, otherwise to the only text of that stem in the
    whole tree. Images with several candidates elsewhere are ambiguous and skipped, as are images without a text, texts
    without an image, and texts that are empty, larger than 1 MiB, not UTF-8 or with NUL bytes. Hidden files and folders
    are ignored.

    Raises UserError when the folder does not exist or holds no pair, or when `report` allows no more bad ones.
    """
    source = "--input-folder {}".format(folder) if report is None else report.source
    if not os.path.isdir(folder):
        raise UserError(
            "{}: no such folder; give one with images and captions, or 'demo' for the built-in set".format(source)
        )
    skipped: Dict[str, List[str]] = {}
    images, texts = list_files(folder, skipped)
    chosen = sorted(_match(images, texts, skipped))
    pairs = FolderPairs(folder, PackedStrings(), PackedStrings(), [])
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
        raise UserError(_nothing_found(source, images, texts, pairs.skipped))
    if report is not None:
        report.check(len(pairs.images) + len(bad))
    return pairs._replace(num_bad=len(bad))


def _nothing_found(source: str, images: List[str], texts: List[str], skipped: List[Skipped]) -> str:
    found = "{} images and {} text files".format(len(images), len(texts))
    why = "; ".join(str(item) for item in skipped)
    return (
        "{}: no pair of image and captions among {} below it{}; expected images ({}) and, with the same "
        "stem, .txt files with one caption per line, e.g. train2017/000000000009.jpg and "
        "train2017_captions/000000000009.txt (for COCO: python data/process_trainset.py makes them)".format(
            source, found, ": " + why if why else "", " ".join("*" + suffix for suffix in IMAGE_SUFFIXES)
        )
    )


def list_files(folder: str, skipped: Optional[Dict[str, List[str]]] = None) -> Tuple[List[str], List[str]]:
    """Return the paths of all images and of all text files below `folder`; unreadable folders go to `skipped`."""
    images: List[str] = []
    texts: List[str] = []
    for path in _walk(folder, {} if skipped is None else skipped):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix == _TEXT_SUFFIX:
            texts.append(path)
    return images, texts


def _walk(folder: str, skipped: Dict[str, List[str]]) -> Iterator[str]:
    """Yield the files below `folder`, through symbolic links too (each real folder once, so that loops end).

    With a list of its own rather than os.walk, which calls itself for each level (before Python 3.12) and can run out.
    """
    seen = set()
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        folders: List[str] = []
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


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into itself
        return False


def _match(images: List[str], texts: List[str], skipped: Dict[str, List[str]]) -> Iterator[Tuple[str, str]]:
    """Yield (image, text) and enter what makes no pair into `skipped` (reason -> paths)."""
    by_stem: Dict[str, List[str]] = {}
    for text in texts:
        by_stem.setdefault(_stem(text), []).append(text)
    unused = set(texts)
    elsewhere = []
    for image in sorted(images):
        beside = os.path.splitext(image)[0]
        text = _text_beside(beside, by_stem.get(_stem(image), ()))
        if text is None:
            elsewhere.append(image)
        elif text in unused:
            unused.remove(text)
            yield image, text
        else:
            skipped.setdefault("images whose captions belong to another image of the same name", []).append(image)
    for image in elsewhere:
        candidates = by_stem.get(_stem(image), [])
        if not candidates:
            skipped.setdefault(_NO_CAPTIONS, []).append(image)
        elif len(candidates) > 1:
            skipped.setdefault("images with several caption files of their name", []).append(image)
            unused.difference_update(candidates)
        elif candidates[0] in unused:
            unused.remove(candidates[0])
            yield image, candidates[0]
        else:
            skipped.setdefault("images whose captions belong to another image of the same name", []).append(image)
    if unused:
        skipped[_NO_IMAGE] = list(unused)


def _text_beside(path_without_suffix: str, candidates: Iterable[str]) -> Optional[str]:
    for text in candidates:
        if os.path.splitext(text)[0] == path_without_suffix:
            return text
    return None


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _read_all(paths: List[str]) -> Iterator[Tuple[str, str]]:
    """Yield `_read_captions` of each path, in order, several at a time: cold and network disks are slow to answer."""
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as executor:
        for results in executor.map(lambda task: [_read_captions(path) for path in task], tasks):
            yield from results


def _read_captions(path: str) -> Tuple[str, str]:
    """Return (captions joined by line breaks, "") or ("", what is wrong with the file)."""
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except OSError:
        return "", "caption files that cannot be read"
    return split_captions(content)


def split_captions(content: bytes) -> Tuple[str, str]:
    """Return (captions joined by line breaks, "") of a caption file's content, or ("", what is wrong with it)."""
    if len(content) > _MAX_TEXT_BYTES:
        return "", "caption files of more than 1 MiB"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "", "caption files that are not UTF-8"
    if "\0" in text:  # no text, or text in UTF-16
        return "", "caption files with NUL bytes"
    # Not splitlines(), which also breaks at U+2028 and the like; a byte order mark is no part of the first caption.
    lines = text.lstrip("\ufeff").replace("\r", "\n").split("\n")
    captions = [line.strip() for line in lines if line.strip()]
    return "\n".join(captions), "" if captions else "empty caption files"
