"""COCO's caption file as one text file per image, the form that training reads.

    python data/process_trainset.py
    python data/process_trainset.py --captions annotations/captions_val2017.json --out-dir val2017_captions

The text file has the name of the image (000000000009.txt) and one caption per line. Captions are cleaned: line breaks
become blanks, blanks collapse, " ." becomes ".". Empty ones, annotations given twice, of unknown images or of another
form than COCO's are left out and listed in skipped.jsonl in --out-dir; should they be more than --max-bad-fraction, no
text file is written. Each file is written whole or not at all, and only where its content changes, so the command can
be interrupted and run again.

It needs neither PyTorch nor any other package of the project than tqdm. For the 591,753 captions of COCO's training
set it takes about 330 MB of memory and less than half a minute.
"""

import json
import logging
import os
import reprlib
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)  # run as a file, Python looks for modules in data/

from tqdm import tqdm  # noqa: E402

from utils.errors import UserError, run_main  # noqa: E402
from utils.files import PathLike, open_regular  # noqa: E402
from utils.flags import Parser, number, parse_flags, path  # noqa: E402
from utils.skipped import Entry, SkipReport, start_report  # noqa: E402

logger = logging.getLogger(__name__)

DEFAULT_CAPTIONS = ROOT / "data" / "COCO" / "annotations" / "captions_train2017.json"
DEFAULT_OUT_DIR = ROOT / "data" / "COCO" / "train2017_captions"
SKIPPED = "skipped.jsonl"

_MAX_JSON_BYTES = 1 << 31  # twenty times COCO's
_MAX_DIGITS = 18


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
    wrong: int
    """Entries dropped because they are of another form than COCO's."""
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
            (self.wrong, "entries that are not of COCO's form"),
            (self.without, "images without captions"),
        )
        return text + "".join("; left out {} {}".format(number, what) for number, what in dropped if number)


def clean_caption(caption: str) -> str:
    """Return the caption on one line: white space collapsed to single blanks, none at the ends or before a stop."""
    # Half of a surrogate pair, which JSON can express and UTF-8 cannot, becomes "?".
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split()).replace(" .", ".")


def process_captions(
    captions_json: PathLike, out_dir: PathLike, progress: bool = False, max_bad_fraction: float = 0.01
) -> Counts:
    """Write one text file per image of COCO's caption file `captions_json` into `out_dir`, which is made if needed.

    Raises UserError for a file that is missing, cut off or not of COCO's form, for more than `max_bad_fraction` of its
    annotations (0 to 1) that cannot be used, and when writing fails.
    """
    out_dir = Path(out_dir)
    skipped = SkipReport(out_dir / SKIPPED, max_bad_fraction, "--captions {}".format(captions_json))
    start_report(out_dir / SKIPPED)
    stems, captions, counts = _read(Path(captions_json), skipped)
    written = 0
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for image_id, lines in tqdm(captions.items(), desc="captions", unit=" images", disable=not progress):
            written += _write_if_changed(out_dir / (stems[image_id] + ".txt"), "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError("--out-dir {}: cannot write: {}".format(out_dir, error)) from error
    return counts._replace(written=written)


_EMPTY = "annotations with an empty caption"
_REPEATED = "annotations whose id came before"
_UNKNOWN = "annotations of images that the file does not list"
_WRONG = "annotations that are not of COCO's form"
_WRONG_IMAGE = "images that are not of COCO's form"


def _read(path: Path, skipped: SkipReport) -> Tuple[Dict[Any, str], Dict[Any, List[str]], Counts]:
    """Return ({image id: stem of its file}, {image id: captions}, counts with `written` still 0)."""
    content = _parse(path)
    bad: List[Entry] = []
    stems = _stems(path, content.get("images"), bad)
    listed = bool(stems)
    captions: Dict[Any, List[str]] = {}
    seen: Set[Any] = set()
    for index, entry in enumerate(content["annotations"]):
        reason, detail = _problem(entry), ""
        if reason:
            reason, detail = _WRONG, reason
        elif entry.id is not None and entry.id in seen:
            reason, detail = _REPEATED, "id {!r}".format(entry.id)
        elif listed and entry.image_id not in stems:
            reason, detail = _UNKNOWN, "image_id {}".format(_shown(entry.image_id))
        else:
            caption = clean_caption(entry.caption)
            reason = "" if caption else _EMPTY
        if isinstance(entry, _Annotation) and _is_id(entry.id):
            seen.add(entry.id)
        if reason:
            bad.append(Entry("annotation {}".format(index), reason, detail))
            continue
        if not listed and entry.image_id not in captions:
            try:
                stems[entry.image_id] = _stem(entry.image_id, None)
            except UserError as error:
                bad.append(Entry("annotation {}".format(index), _WRONG, str(error)))
                continue
        captions.setdefault(entry.image_id, []).append(caption)
    return stems, captions, _judge(path, skipped, bad, content, stems, captions)


def _judge(
    path: Path,
    skipped: SkipReport,
    bad: List[Entry],
    content: Dict[str, Any],
    stems: Dict[Any, str],
    captions: Dict[Any, List[str]],
) -> Counts:
    """List what is bad, and return the counts. Raises UserError when it is too much, or nothing is left."""
    kinds = Counter(entry.reason for entry in bad)
    if content["annotations"]:
        skipped.add_all(bad)
        skipped.check(len(content["annotations"]) + kinds[_WRONG_IMAGE])
    if not captions:
        why = " ({})".format(skipped.summary()) if bad else ""
        raise UserError("--captions {}: no caption in it{}".format(path, why))
    _check_stems_differ(path, {image_id: stems[image_id] for image_id in captions})
    return Counts(
        images=len(captions),
        captions=sum(len(lines) for lines in captions.values()),
        written=0,
        empty=kinds[_EMPTY],
        repeated=kinds[_REPEATED],
        unknown=kinds[_UNKNOWN],
        wrong=kinds[_WRONG] + kinds[_WRONG_IMAGE],
        without=len(stems) - len(captions),
    )


def _parse(path: Path) -> Dict[str, Any]:
    """Return the file's top-level object with `_Annotation`s and `_Image`s in it."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_JSON_BYTES:
                raise UserError("--captions {}: too large to be COCO's captions".format(path))
            raw = file.read(size)
        text = raw.decode("utf-8-sig")
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
        content = json.loads(text, object_hook=_reduce, parse_int=_whole)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise UserError("--captions {}: the file is cut off; fetch it again".format(path)) from error
        raise UserError("--captions {}: not a JSON file: {}".format(path, error)) from error
    except RecursionError as error:
        raise UserError("--captions {}: nested too deeply to be COCO's captions".format(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError("--captions {}: no list 'annotations' in it; expected COCO's captions_*.json".format(path))
    return content


def _whole(digits: str) -> Any:
    """Read a whole number of JSON; one beyond any id becomes a float, which no id is (long ones take for ever)."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits[:_MAX_DIGITS])


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
        return "has an 'image_id' that is neither a whole number nor a text: {}".format(_shown(entry.image_id))
    if entry.caption is None:
        return "has no 'caption'; expected captions_*.json, not instances_*.json"
    if not isinstance(entry.caption, str):
        return "has a 'caption' that is no text: {}".format(_shown(entry.caption))
    if entry.id is not None and not _is_id(entry.id):
        return "has an 'id' that is neither a whole number nor a text: {!r}".format(entry.id)
    return ""


def _is_id(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or isinstance(value, str)


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _stems(path: Path, images: Optional[List[Any]], bad: List[Entry]) -> Dict[Any, str]:
    """Return {image id: stem} of the file's "images"; empty when it has none. What is none of COCO's goes to `bad`."""
    if images is None:
        return {}
    if not isinstance(images, list):
        raise UserError("--captions {}: 'images' must be a list".format(path))
    stems: Dict[Any, str] = {}
    for index, image in enumerate(images):
        name = "image {}".format(index)
        if not isinstance(image, _Image) or not _is_id(image.id) or not isinstance(image.file_name, str):
            bad.append(Entry(name, _WRONG_IMAGE, "lacks a valid 'id' or 'file_name'"))
            continue
        try:
            stem = _stem(image.id, image.file_name)
        except UserError as error:
            bad.append(Entry(name, _WRONG_IMAGE, str(error)))
            continue
        if stems.setdefault(image.id, stem) != stem:
            detail = "id {!r} is of the file {!r}, too".format(image.id, stems[image.id])
            bad.append(Entry(name, _WRONG_IMAGE, detail))
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
        raise UserError("image id {} gives no file name".format(_shown(image_id)))
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


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Read the flags and convert."""
    parser = Parser(description="Turn COCO's caption JSON into one text file per image.")
    parser.add_argument(
        "--captions", type=path, default=str(DEFAULT_CAPTIONS), metavar="JSON", help="default: %(default)s"
    )
    parser.add_argument(
        "--out-dir", type=path, default=str(DEFAULT_OUT_DIR), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=number(0, 1),
        default=0.01,
        metavar="F",
        help="share of the annotations that may be left out; default: %(default)s",
    )
    flags = parse_flags(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts = process_captions(flags.captions, flags.out_dir, progress=True, max_bad_fraction=flags.max_bad_fraction)
    logger.info("%s: %s", flags.out_dir, counts)


if __name__ == "__main__":
    run_main(main)
