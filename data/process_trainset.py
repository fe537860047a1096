"""Convert a list of captions to one text file per image, the format that training reads.

    python data/process_trainset.py
    python data/process_trainset.py --captions annotations/captions_val2017.json --out-dir val2017_captions
    python data/process_trainset.py --captions flickr8k/captions.txt --out-dir flickr8k/captions

The list is COCO's or Karpathy's JSON, other JSON or JSON lines with an image and a caption in each object, or a table
(see utils/caption_lists.py). The text file has the name of the image (000000000009.txt) and one caption per line; where
images in different folders have the same name, it is in a folder of the same name. Captions are cleaned: line breaks
become spaces, spaces collapse, " ." becomes ".". Empty captions and annotations that are duplicate, of unknown images
or without image or caption are skipped and listed in skipped.jsonl in --out-dir; if they exceed --max-bad-fraction, no
text file is written. Files are written atomically, and only if their content changes, so the command can be interrupted
and run again.

It needs only tqdm, not PyTorch. For the 591,753 captions of COCO's training set it takes about 330 MB of memory and
less than half a minute.
"""
from __future__ import annotations

import logging
import os
import reprlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)  # run as a file: Python looks for modules in data/

from tqdm import tqdm  # noqa: E402

from utils.caption_lists import Image, Row, is_image_name, read_list  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402
from utils.files import PathLike, make_folder  # noqa: E402
from utils.flags import CaptionOptions, DataOptions  # noqa: E402
from utils.options import Command, again, option  # noqa: E402
from utils.skipped import Entry, SkipReport, start_report  # noqa: E402

logger = logging.getLogger(__name__)

DEFAULT_CAPTIONS = ROOT / "data" / "COCO" / "annotations" / "captions_train2017.json"
DEFAULT_OUT_DIR = ROOT / "data" / "COCO" / "train2017_captions"
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class CaptionFileOptions(CaptionOptions):
    """The flags of this command."""

    captions: str = option(str(DEFAULT_CAPTIONS), "list of captions: JSON, JSON lines, CSV or TSV", path=True)
    image_column: str | None = again(CaptionOptions, "caption_column", help="the same for the image")
    out_dir: str = option(str(DEFAULT_OUT_DIR), "folder for the text files", path=True)
    max_bad_fraction: float = again(DataOptions, "max_bad_fraction")


COMMAND = Command("process_trainset.py", "Turn a list of captions into one text file per image.", CaptionFileOptions)


class Counts(NamedTuple):
    """Result of `process_captions`."""

    images: int
    """Images with captions; each has a text file."""
    captions: int
    written: int
    """Text files that are new or changed."""
    empty: int
    """Captions dropped because they are empty."""
    repeated: int
    """Annotations dropped because of a duplicate id."""
    unknown: int
    """Captions dropped because their image is not in "images"."""
    wrong: int
    """Entries dropped because they lack an image or a caption."""
    without: int
    """Listed images without captions, which get no file."""

    def __str__(self) -> str:
        text = f"{self.captions} captions of {self.images} images; {self.written} text files written, "
        text += f"{self.images - self.written} unchanged"
        dropped = (
            (self.empty, "empty captions"),
            (self.repeated, "annotations with a duplicate id"),
            (self.unknown, "captions of unlisted images"),
            (self.wrong, "entries without image or caption"),
            (self.without, "images without captions"),
        )
        return text + "".join(f"; skipped {number} {what}" for number, what in dropped if number)


def clean_caption(caption: str) -> str:
    """Return the caption on one line: white space collapsed to single spaces, none at the ends or before a period."""
    # A lone surrogate, which JSON can express and UTF-8 cannot, becomes "?".
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split()).replace(" .", ".")


def process_captions(
    captions: PathLike,
    out_dir: PathLike,
    progress: bool = False,
    max_bad_fraction: float = 0.01,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Counts:
    """Write one text file per image of the list `captions` into `out_dir`, which is created if missing.

    image_column, caption_column: keys or columns to use instead of the usual ones, see utils/caption_lists.py.
    Raises UserError for a file that is missing, truncated or not a list of captions, if more than `max_bad_fraction` of
    its entries (0 to 1) are unusable, and when writing fails.
    """
    out_dir = Path(out_dir)
    skipped = SkipReport(out_dir / SKIPPED, max_bad_fraction, f"--captions {captions}")
    start_report(out_dir / SKIPPED)
    stems, lines_of, counts = _read(Path(captions), skipped, image_column, caption_column)
    written = 0
    make_folder("--out-dir", out_dir)
    try:
        hidden = None if progress else True  # None: shown on a terminal alone
        for image_id, lines in tqdm(lines_of.items(), desc="captions", unit=" images", disable=hidden):
            written += _write_if_changed(out_dir / (stems[image_id] + ".txt"), "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"--out-dir {out_dir}: cannot write: {error}") from error
    return counts._replace(written=written)


_EMPTY = "entries with an empty caption"
_REPEATED = "annotations with a duplicate id"
_UNKNOWN = "annotations of unlisted images"
_WRONG = "entries without image or caption"
_WRONG_IMAGE = "images that are not in COCO's format"


def _read(
    path: Path, skipped: SkipReport, image_column: str | None, caption_column: str | None
) -> tuple[dict[Any, str], dict[Any, list[str]], Counts]:
    """Return ({image: stem of its text file}, {image: captions}, counts with `written` still 0)."""
    content = read_list(path, image_column, caption_column)
    bad: list[Entry] = []
    names = _names(path, content.images, bad)
    listed = bool(names)
    captions: dict[Any, list[str]] = {}
    seen: set[Any] = set()
    total = 0
    for row in content.rows:
        total += max(1, len(row.captions))
        reason, detail = _problem(row), ""
        if reason:
            reason, detail = _WRONG, reason
        elif row.id is not None and row.id in seen:
            reason, detail = _REPEATED, f"id {row.id!r}"
        elif listed and row.image not in names:
            reason, detail = _UNKNOWN, f"image_id {_shown(row.image)}"
        if row.id is not None and _is_id(row.id):
            seen.add(row.id)
        if not reason and row.image not in names:
            try:
                # COCO's ids are names; elsewhere a name ends with an image suffix.
                is_file = isinstance(row.image, str) and is_image_name(row.image)
                names[row.image] = _name(row.image, row.image if is_file else None)
            except UserError as error:
                reason, detail = _WRONG, str(error)
        if reason:
            bad.append(Entry(row.name, reason, detail))
            continue
        lines = [line for line in map(clean_caption, row.captions) if line]
        bad += [Entry(row.name, _EMPTY)] * (len(row.captions) - len(lines))
        if lines:
            captions.setdefault(row.image, []).extend(lines)
    counts = _counts(path, skipped, bad, total, names, captions)
    return _stems(path, {image: names[image] for image in captions}), captions, counts


def _counts(
    path: Path,
    skipped: SkipReport,
    bad: list[Entry],
    total: int,
    names: dict[Any, PurePosixPath],
    captions: dict[Any, list[str]],
) -> Counts:
    """Report bad entries and return the counts. Raises UserError for too many bad entries, or no captions."""
    kinds = Counter(entry.reason for entry in bad)
    if total:
        skipped.add_all(bad)
        skipped.check(total + kinds[_WRONG_IMAGE])
    if not captions:
        why = f" ({skipped.summary()})" if bad else ""
        raise UserError(f"--captions {path}: no captions found{why}")
    return Counts(
        images=len(captions),
        captions=sum(len(lines) for lines in captions.values()),
        written=0,
        empty=kinds[_EMPTY],
        repeated=kinds[_REPEATED],
        unknown=kinds[_UNKNOWN],
        wrong=kinds[_WRONG] + kinds[_WRONG_IMAGE],
        without=len(names) - len(captions),
    )


def _problem(row: Row) -> str:
    """Return why an entry is not a caption of an image, or ""."""
    if row.image is None or row.image == "":
        return row.problem if row.problem.startswith(("has no", "is not")) else "names no image"
    if not _is_id(row.image):
        return f"has an image that is neither an integer nor text: {_shown(row.image)}"
    if row.id is not None and not _is_id(row.id):
        return f"has an 'id' that is neither an integer nor text: {row.id!r}"
    return row.problem


def _is_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or isinstance(value, str)


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _names(path: Path, images: list[Any] | None, bad: list[Entry]) -> dict[Any, PurePosixPath]:
    """Return {image id: name without suffix} of COCO's "images", if present. Bad entries are added to `bad`."""
    if images is None:
        return {}
    if not isinstance(images, list):
        raise UserError(f"--captions {path}: 'images' must be a list")
    names: dict[Any, PurePosixPath] = {}
    for index, image in enumerate(images):
        entry = f"image {index}"
        if not isinstance(image, Image) or not _is_id(image.id) or not isinstance(image.file_name, str):
            bad.append(Entry(entry, _WRONG_IMAGE, "lacks a valid 'id' or 'file_name'"))
            continue
        try:
            name = _name(image.id, image.file_name)
        except UserError as error:
            bad.append(Entry(entry, _WRONG_IMAGE, str(error)))
            continue
        if names.setdefault(image.id, name) != name:
            detail = f"id {image.id!r} is of the file {str(names[image.id])!r}, too"
            bad.append(Entry(entry, _WRONG_IMAGE, detail))
    return names


def _name(image: Any, file_name: str | None) -> PurePosixPath:
    """Return an image's folders and stem: of its file name if known, else its id, in twelve digits as in COCO."""
    name = str(image) if file_name is None else file_name
    # Without parts that lead out of --out-dir.
    parts = name.replace("\\", "/").replace("\0", "").encode("utf-8", "replace").decode("utf-8").split("/")
    stem = parts[-1] if file_name is None else PurePosixPath(parts[-1]).stem
    if isinstance(image, int) and (file_name is None or not stem.strip(".")):
        stem = f"{image:012d}"
    if not stem.strip("."):
        raise UserError(f"image id {_shown(image)} gives no file name")
    return PurePosixPath(*(part for part in parts[:-1] if part.strip(".") and ":" not in part), stem)


def _stems(path: Path, names: dict[Any, PurePosixPath]) -> dict[Any, str]:
    """Return {image: path of its text file without suffix}: its stem, with its folders if stems are not unique.

    Raises UserError when two images would share a text file.
    """
    stems = {image: name.name for image, name in names.items()}
    if len(set(stems.values())) < len(stems):
        stems = {image: str(name) for image, name in names.items()}
    owners: dict[str, Any] = {}
    for image, stem in stems.items():
        if stem in owners:
            message = "--captions {}: images {!r} and {!r} have files of the same name '{}'; split the list"
            raise UserError(message.format(path, owners[stem], image, stem))
        owners[stem] = image
    return stems


def _write_if_changed(path: Path, text: str) -> bool:
    """Write `text` to `path` unless it is already there; return whether it was written.

    Like utils.files.atomic_write, but without an fsync for each of 118,000 small files: the next run repairs what a
    power failure left incomplete.
    """
    content = text.encode("utf-8")
    try:
        with open(str(path), "rb") as file:
            if file.read() == content:
                return False
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(str(temporary), "wb") as file:
            file.write(content)
        os.replace(str(temporary), str(path))
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and convert."""
    flags = COMMAND.parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts = process_captions(
        flags.captions,
        flags.out_dir,
        progress=True,
        max_bad_fraction=flags.max_bad_fraction,
        image_column=flags.image_column,
        caption_column=flags.caption_column,
    )
    logger.info("%s: %s", flags.out_dir, counts)


if __name__ == "__main__":
    run_main(main)
