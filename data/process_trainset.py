"""COCO's caption file as one text file per image, the form that training reads.

    python data/process_trainset.py
    python data/process_trainset.py --captions annotations/captions_val2017.json --out-dir val2017_captions

The text file has the name of the image (000000000009.txt) and one caption per line. Captions are cleaned: line breaks
become blanks, blanks collapse, " ." becomes "."; empty ones are dropped. Each file is written whole or not at all, and
only where its content changes, so the command can be interrupted and run again.

It needs neither PyTorch nor any other package of the project than tqdm. For the 591,753 captions of COCO's training
set it takes about 330 MB of memory and less than half a minute.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)  # run as a file, Python looks for modules in data/

from tqdm import tqdm  # noqa: E402

from utils.errors import UsageError, UserError, run_main  # noqa: E402
from utils.files import PathLike  # noqa: E402

logger = logging.getLogger(__name__)

DEFAULT_CAPTIONS = ROOT / "data" / "COCO" / "annotations" / "captions_train2017.json"
DEFAULT_OUT_DIR = ROOT / "data" / "COCO" / "train2017_captions"


class _Annotation(NamedTuple):
    """What is kept of one entry of "annotations"; fields that the entry lacks are None."""

    image_id: Any
    caption: Any
    id: Any


class _Image(NamedTuple):
    """What is kept of one entry of "images"."""

    id: Any
    file_name: Any


class Counts(NamedTuple):
    """What `process_captions` did."""

    images: int
    """Images with captions, each with a text file now."""
    captions: int
    written: int
    """Text files that are new or changed; the others already held the same."""
    empty: int
    """Captions dropped because nothing was left of them."""
    repeated: int
    """Annotations dropped because one with the same id came before."""
    unknown: int
    """Captions dropped because "images" does not list their image."""
    without: int
    """Images listed that have no caption and get no file."""

    def __str__(self) -> str:
        text = "{} captions of {} images; {} text files written, {} unchanged".format(
            self.captions, self.images, self.written, self.images - self.written
        )
        dropped = (
            (self.empty, "empty captions"),
            (self.repeated, "annotations whose id came before"),
            (self.unknown, "captions of images that the file does not list"),
            (self.without, "images without captions"),
        )
        return text + "".join("; left out {} {}".format(number, what) for number, what in dropped if number)


def clean_caption(caption: str) -> str:
    """Return the caption on one line: white space collapsed to single blanks, none at the ends or before a stop."""
    # Half of a surrogate pair, which JSON can express and UTF-8 cannot, becomes "?".
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split()).replace(" .", ".")


def process_captions(captions_json: PathLike, out_dir: PathLike, progress: bool = False) -> Counts:
    """Write one text file per image of COCO's caption file `captions_json` into `out_dir`, which is made if needed.

    Raises UserError for a file that is missing, cut off or not of COCO's form, and when writing fails.
    """
    stems, captions, counts = _read(Path(captions_json))
    out_dir = Path(out_dir)
    written = 0
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for image_id, lines in tqdm(captions.items(), desc="captions", unit=" images", disable=not progress):
            written += _write_if_changed(out_dir / (stems[image_id] + ".txt"), "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError("--out-dir {}: cannot write: {}".format(out_dir, error)) from error
    return counts._replace(written=written)


def _read(path: Path) -> Tuple[Dict[Any, str], Dict[Any, List[str]], Counts]:
    """Return ({image id: stem of its file}, {image id: captions}, counts with `written` still 0)."""
    content = _parse(path)
    stems = _stems(path, content.get("images"))
    listed = bool(stems)
    captions: Dict[Any, List[str]] = {}
    seen: Set[Any] = set()
    empty = repeated = unknown = 0
    for index, entry in enumerate(content["annotations"]):
        problem = _problem(entry)
        if problem:
            raise UserError("--captions {}: annotation {} {}".format(path, index, problem))
        if entry.id is not None and entry.id in seen:
            repeated += 1
            continue
        seen.add(entry.id)
        if listed and entry.image_id not in stems:
            unknown += 1
            continue
        caption = clean_caption(entry.caption)
        if not caption:
            empty += 1
            continue
        if not listed and entry.image_id not in captions:
            stems[entry.image_id] = _stem(entry.image_id, None)
        captions.setdefault(entry.image_id, []).append(caption)
    if not captions:
        why = " ({} of images that it does not list)".format(unknown) if unknown else ""
        raise UserError("--captions {}: no caption in it{}".format(path, why))
    _check_stems_differ(path, {image_id: stems[image_id] for image_id in captions})
    num_captions = sum(len(lines) for lines in captions.values())
    return stems, captions, Counts(len(captions), num_captions, 0, empty, repeated, unknown, len(stems) - len(captions))


def _parse(path: Path) -> Dict[str, Any]:
    """Return the file's top-level object with `_Annotation`s and `_Image`s in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(
            "--captions {}: no such file; COCO's captions are in annotations_trainval2017.zip, which "
            "utils/download_coco_dataset.sh fetches".format(path)
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("--captions {}: not a JSON file (it is not UTF-8 text)".format(path)) from error
    except OSError as error:
        raise UserError("--captions {}: cannot be read: {}".format(path, error)) from error
    try:
        # Reducing each entry as it is read keeps memory at a third: most of an entry is not needed here.
        content = json.loads(text, object_hook=_reduce)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise UserError("--captions {}: the file is cut off; fetch it again".format(path)) from error
        raise UserError("--captions {}: not a JSON file: {}".format(path, error)) from error
    except RecursionError as error:
        raise UserError("--captions {}: nested too deeply to be COCO's captions".format(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError("--captions {}: no list 'annotations' in it; expected COCO's captions_*.json".format(path))
    return content


def _reduce(entry: Dict[str, Any]) -> Any:
    """Return what is needed of a JSON object (called for every one in the file, the innermost first)."""
    if "image_id" in entry:
        return _Annotation(entry["image_id"], entry.get("caption"), entry.get("id"))
    if "file_name" in entry:
        return _Image(entry.get("id"), entry["file_name"])
    if "annotations" in entry or "images" in entry:
        return entry
    return None


def _problem(entry: Any) -> str:
    """Return what keeps an entry of "annotations" from being a caption, or ""."""
    if not isinstance(entry, _Annotation):
        return "has no 'image_id'; expected COCO's captions_*.json"
    if not _is_id(entry.image_id):
        return "has an 'image_id' that is neither a whole number nor a text: {!r}".format(entry.image_id)
    if entry.caption is None:
        return "has no 'caption'; expected captions_*.json, not instances_*.json"
    if not isinstance(entry.caption, str):
        return "has a 'caption' that is no text: {!r}".format(entry.caption)
    if entry.id is not None and not _is_id(entry.id):
        return "has an 'id' that is neither a whole number nor a text: {!r}".format(entry.id)
    return ""


def _is_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or isinstance(value, str)


def _stems(path: Path, images: Optional[List[Any]]) -> Dict[Any, str]:
    """Return {image id: stem} of the file's "images"; empty when it has none."""
    if images is None:
        return {}
    if not isinstance(images, list):
        raise UserError("--captions {}: 'images' must be a list".format(path))
    stems: Dict[Any, str] = {}
    for index, image in enumerate(images):
        if not isinstance(image, _Image) or not _is_id(image.id) or not isinstance(image.file_name, str):
            raise UserError("--captions {}: image {} lacks a valid 'id' or 'file_name'".format(path, index))
        stem = _stem(image.id, image.file_name)
        if stems.setdefault(image.id, stem) != stem:
            message = "--captions {}: image id {!r} has two files, {} and {}"
            raise UserError(message.format(path, image.id, stems[image.id], stem))
    return stems


def _stem(image_id: Any, file_name: Optional[str]) -> str:
    """Return the stem of an image's file: of its name where known, else its id in twelve digits, as COCO has it."""
    name = str(image_id) if file_name is None else file_name
    # Only the last part of a name counts, so that no name leads out of --out-dir.
    last = PurePosixPath(name.replace("\\", "/").replace("\0", "")).name
    stem = last if file_name is None else PurePosixPath(last).stem
    stem = stem.encode("utf-8", "replace").decode("utf-8")
    if isinstance(image_id, int) and (file_name is None or not stem.strip(".")):
        return "{:012d}".format(image_id)
    if not stem.strip("."):
        raise UserError("--captions: image id {!r} gives no file name".format(image_id))
    return stem


def _check_stems_differ(path: Path, stems: Dict[Any, str]) -> None:
    """Raise UserError when two images would share a text file."""
    owners: Dict[str, Any] = {}
    for image_id, stem in stems.items():
        if stem in owners:
            message = "--captions {}: images {!r} and {!r} have files of the same name '{}'; split the file by folder"
            raise UserError(message.format(path, owners[stem], image_id, stem))
        owners[stem] = image_id


def _write_if_changed(path: Path, text: str) -> bool:
    """Make `path` hold `text`; return whether it did not before.

    Like utils.files.atomic_write, but without waiting for the disk after each of 118,000 small files: what a power
    failure could leave incomplete, the next run repairs.
    """
    content = text.encode("utf-8")
    try:
        with open(str(path), "rb") as file:
            if file.read() == content:
                return False
    except FileNotFoundError:
        pass
    temporary = path.with_name(".{}.{}.tmp".format(path.name, os.getpid()))
    try:
        with open(str(temporary), "wb") as file:
            file.write(content)
        os.replace(str(temporary), str(path))
    except BaseException:
        if temporary.exists():
            temporary.unlink()
        raise
    return True


class _Parser(argparse.ArgumentParser):
    """argparse that reports mistakes the way the whole project does."""

    def error(self, message: str) -> Any:
        raise UsageError("{} (see --help)".format(message))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Read the flags and convert."""
    parser = _Parser(description="Turn COCO's caption JSON into one text file per image.", allow_abbrev=False)
    parser.add_argument("--captions", default=str(DEFAULT_CAPTIONS), metavar="JSON", help="default: %(default)s")
    parser.add_argument("--out-dir", default=str(DEFAULT_OUT_DIR), metavar="DIR", help="default: %(default)s")
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts = process_captions(flags.captions, flags.out_dir, progress=True)
    logger.info("%s: %s", flags.out_dir, counts)


if __name__ == "__main__":
    run_main(main)
