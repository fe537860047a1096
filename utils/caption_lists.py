"""Caption lists, recognised by their content, not by the file name.

    COCO            {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [{"image_id": 9, "caption": "A cat"}]}
    Karpathy        {"images": [{"filename": "9.jpg", "sentences": [{"raw": "A cat"}, ...]}, ...]}
    other JSON      [{"image": "9.jpg", "caption": "A cat" or ["A cat", ...]}, ...], or {"9.jpg": "A cat" or [...], ...}
    JSON lines      one object per line, as in metadata.jsonl of Hugging Face's ImageFolder
    tables          CSV, TSV, or columns separated by | or ;, as Flickr8k's captions.txt and Flickr30k's results.csv;
                    without a header where each line begins with an image: 9.jpg#0<TAB>A cat

Needs only the standard library. Of large JSON files, only the fields needed stay in memory.
"""
from __future__ import annotations

import csv
import io
import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

from utils.errors import UserError
from utils.files import IMAGE_SUFFIXES, open_regular

IMAGE_KEYS = ("file_name", "filename", "image", "image_name", "image_file", "image_path", "img", "img_path", "filepath")
IMAGE_KEYS += ("file_path", "path", "file", "image_id")
CAPTION_KEYS = ("caption", "captions", "text", "sentences", "sentence", "comment", "raw", "description", "prompt",
                "prompts")
"""Names of keys and columns, case-insensitive, the most specific first."""

MAX_BYTES = 1 << 31
"""Twenty times COCO's captions."""

_MAX_DIGITS = 18
_LONGEST_HEADER = 10_000
_DELIMITERS = "\t,|;"
_NUMBER_OF_CAPTION = re.compile(r"#\d+$")
_JSON_START = re.compile(r"""\s*(\[\s*([\[{"\]\d-]|$)|{\s*(["}]|$))""")  # does not match "[A sign] that says ..."
_SHOWN_KEYS = 30


class Row(NamedTuple):
    """The captions of one entry."""

    name: str
    """Name of the entry, for messages."""
    image: Any
    """Its image: a file name or an id; None if the entry has none. May be any JSON value."""
    captions: list[str]
    problem: str = ""
    """Why there are no captions."""
    id: Any = None
    """The entry's own id in COCO's files."""
    record: dict[str, Any] | None = None
    """All of the entry, where that was asked for (not of COCO's files)."""


class Image(NamedTuple):
    """An entry of COCO's "images". A field is None where the entry lacks it."""

    id: Any
    file_name: Any


class CaptionList(NamedTuple):
    """The content of a file."""

    rows: Iterable[Row]
    images: list[Any] | None = None
    """COCO's "images", each an `Image` unless malformed: file names for the ids in `rows`."""


def read_list(
    path: Path, image_key: str | None = None, caption_key: str | None = None, with_images: bool = True
) -> CaptionList:
    """Return the entries of a file.

    image_key, caption_key: the JSON keys or columns to use, instead of the usual names; in a table without a header
    their numbers, from 1. with_images: entries must name their images.

    Raises UserError where the file cannot be read or its captions (and images) are not recognised.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"--captions {path}: the file is empty or truncated; download it again")
    found = find_list(path, text, image_key, caption_key, with_images)
    if found is None:
        keys = _Keys(path, image_key, caption_key, with_images)
        raise keys.not_recognised("not a JSON file, and not a table with a recognisable column of captions")
    return found


def find_list(
    path: Path, text: str, image_key: str | None, caption_key: str | None, with_images: bool, records: bool = False
) -> CaptionList | None:
    """`read_list` of the text of a file; None if it is neither JSON nor recognisable as a table.

    records: keep whole entries.
    """
    keys = _Keys(path, image_key, caption_key, with_images, records)
    if _JSON_START.match(text):
        lines = re.match(r"\s*(.*)\n\s*\S", text)
        if lines is not None and _is_json(lines.group(1)):
            return CaptionList(_json_lines(text, keys))
        if not (image_key or caption_key) and re.search(r'"annotations"\s*:\s*\[', text):
            content = _load(path, text, _reduce)
            if isinstance(content, dict) and isinstance(content.get("annotations"), list):
                return CaptionList(_coco_rows(content["annotations"]), content.get("images"))
        return CaptionList(_json_rows(text, keys))
    rows = _table(text.lstrip("\r\n"), keys)
    return None if rows is None else CaptionList(rows)


def read_text(path: Path) -> str:
    """Return the text of a file given by --captions. Raises UserError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UserError(f"--captions {path}: too large to be a list of captions")
            text = file.read(size).decode("utf-8-sig")
        if "\0" in text:
            raise UserError(f"--captions {path}: not a text file: it holds NUL characters; save it as UTF-8")
        return text
    except FileNotFoundError as error:
        raise UserError(
            f"--captions {path}: no such file or folder; COCO's captions are in annotations_trainval2017.zip, which "
            "utils/download_coco_dataset.sh downloads"
        ) from error
    except UnicodeDecodeError as error:
        why = f"not a text file (it is not UTF-8: {error.reason}); save it as UTF-8"
        raise UserError(f"--captions {path}: {why}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--captions {path}: cannot be read: {reason}") from error


# Keys ----------------------------------------------------------------------------------------------------------------


class _Keys:
    """Finds the image and caption keys among those of a file."""

    def __init__(
        self, path: Path, image: str | None, caption: str | None, with_images: bool, records: bool = False
    ) -> None:
        self.path, self.image, self.caption, self.with_images, self.records = path, image, caption, with_images, records
        self.needed = {key.lower() for key in (*IMAGE_KEYS, *CAPTION_KEYS, image, caption) if key}

    def choose(self, names: Sequence[str]) -> tuple[str | None, str] | None:
        """Return (image key, caption key) among names; None where one is missing."""
        image, caption = _pick(names, self.image, IMAGE_KEYS), _pick(names, self.caption, CAPTION_KEYS)
        if caption is None or (image is None and self.with_images):
            return None
        return image, caption

    def not_recognised(self, why: str) -> UserError:
        """Return the error for a file in which captions or their images are not found."""
        flags = "--image-column and --caption-column" if self.with_images else "--caption-column"
        return UserError(
            f"--captions {self.path}: {why}; expected COCO's or Karpathy's JSON, JSON or JSON lines of objects with an "
            f"image and a caption, or a table with a header; name other keys or columns with {flags}"
        )

    def reduce(self, seen: dict[str, None]) -> Any:
        """Return a hook for JSON objects that keeps the keys that may be needed, and records all keys in `seen`."""

        def hook(entry: dict[str, Any]) -> dict[str, Any]:
            for key in entry:
                if len(seen) < _SHOWN_KEYS:
                    seen.setdefault(key)
            if self.records:
                return entry
            return {key: value for key, value in entry.items() if key.lower() in self.needed or _is_nested(key, value)}

        return hook


def _pick(names: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    if given is not None:
        return given if given in names else None
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _is_nested(key: str, value: Any) -> bool:
    return is_image_name(key) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def is_image_name(name: str) -> bool:
    """Whether a text looks like the name of an image file."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _captions(value: Any) -> list[str] | None:
    """Return the captions in a JSON value: a string, or a list of strings or of Karpathy's sentences; else None."""
    if isinstance(value, str):
        if value.startswith('["'):  # a list in a table cell, as in Flickr30k's table on Hugging Face
            try:
                return _captions(json.loads(value)) or [value]
            except (ValueError, RecursionError):
                return [value]
        return [value]
    if not isinstance(value, list):
        return None
    items = [item.get("raw", item.get("caption")) if isinstance(item, dict) else item for item in value]
    texts = [item for item in items if isinstance(item, str)]
    return texts if texts and len(texts) == len(items) else None


def _row(name: str, image: Any, value: Any, key: str, record: dict[str, Any] | None = None) -> Row:
    captions = _captions(value)
    if captions is None:
        what = f"has no {key!r}" if value is None else f"has a {key!r} that is not text: {reprlib.repr(value)}"
        return Row(name, image, [], what)
    return Row(name, image, captions, record=record)


# JSON ----------------------------------------------------------------------------------------------------------------


def _load(path: Path, text: str, hook: Any) -> Any:
    try:
        return json.loads(text, object_hook=hook, parse_int=_whole)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise UserError(f"--captions {path}: the file is truncated; download it again") from error
        raise UserError(f"--captions {path}: not a JSON file: {error}") from error
    except RecursionError as error:
        raise UserError(f"--captions {path}: nested too deeply to be a list of captions") from error


def _whole(digits: str) -> Any:
    """Parse a JSON integer; one too long for an id becomes a float (very long integers are slow to parse)."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits[:_MAX_DIGITS])


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line, parse_int=_whole), dict)
    except (ValueError, RecursionError):
        return False


class _Annotation(NamedTuple):
    """The needed fields of one entry of COCO's "annotations": a third of its memory."""

    image_id: Any
    caption: Any
    id: Any


def _reduce(entry: dict[str, Any]) -> Any:
    """Keep the needed fields of an object in COCO's file (called for each one, innermost first)."""
    if "image_id" in entry or "caption" in entry:
        return _Annotation(entry.get("image_id"), entry.get("caption"), entry.get("id"))
    if "file_name" in entry:
        return Image(entry.get("id"), entry["file_name"])
    return entry if "annotations" in entry or "images" in entry else None


def _coco_rows(annotations: list[Any]) -> Iterator[Row]:
    for index, entry in enumerate(annotations):
        name = f"annotation {index}"
        if not isinstance(entry, _Annotation):
            yield Row(name, None, [], "has no 'image_id' and no 'caption'; expected COCO's captions_*.json")
        elif entry.caption is None:
            problem = "has no 'caption'; expected captions_*.json, not instances_*.json"
            yield Row(name, entry.image_id, [], problem, entry.id)
        elif not isinstance(entry.caption, str):
            problem = f"has a 'caption' that is not text: {reprlib.repr(entry.caption)}"
            yield Row(name, entry.image_id, [], problem, entry.id)
        else:
            yield Row(name, entry.image_id, [entry.caption], "", entry.id)


def _json_rows(text: str, keys: _Keys) -> Iterator[Row]:
    seen: dict[str, None] = {}
    content = _load(keys.path, text, keys.reduce(seen))
    if isinstance(content, dict) and content and all(is_image_name(key) for key in content):
        return (_row(f"entry {name!r}", name, value, "caption") for name, value in content.items())
    lists = [content]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)] + [[content]]
    for entries in lists:
        chosen = _choose(entries if isinstance(entries, list) else [], keys)
        if chosen is not None:
            return (_entry(f"entry {index}", entry, *chosen, keys) for index, entry in enumerate(entries))
    names = f" (keys found: {', '.join(seen)})" if seen else ""
    raise keys.not_recognised(f"no list 'annotations' and no other list of images and captions in it{names}")


def _json_lines(text: str, keys: _Keys) -> Iterator[Row]:
    seen: dict[str, None] = {}
    hook = keys.reduce(seen)

    def entries() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(io.StringIO(text), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line, object_hook=hook, parse_int=_whole)
                except (ValueError, RecursionError):
                    yield f"line {number}", None

    found = list(entries())
    chosen = _choose([entry for _, entry in found], keys)
    if chosen is None:
        raise keys.not_recognised(f"no image and caption in its objects (keys found: {', '.join(seen)})")
    return (_entry(name, entry, *chosen, keys) for name, entry in found)


def _choose(entries: list[Any], keys: _Keys) -> tuple[str | None, str] | None:
    """Return the keys of the first entry that has an image and a caption."""
    found = (keys.choose(list(entry)) for entry in entries if isinstance(entry, dict))
    return next((chosen for chosen in found if chosen is not None), None)


def _entry(name: str, entry: Any, image: str | None, caption: str, keys: _Keys) -> Row:
    if not isinstance(entry, dict):
        return Row(name, None, [], "is not a JSON object")
    file, folder = None if image is None else entry.get(image), entry.get("filepath")
    if image == "filename" and isinstance(file, str) and isinstance(folder, str) and not is_image_name(folder):
        file = f"{folder}/{file}"  # Karpathy's: files of different folders may have one name
    return _row(name, file, entry.get(caption), caption, entry if keys.records else None)


# Tables --------------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """The layout of a table; columns are counted from 0."""

    delimiter: str
    header: bool
    image: int | None
    caption: int
    caption_name: str
    width: int
    """Number of columns."""
    names: Sequence[str] = ()
    """Of the columns, where whole entries are kept."""


def _table(text: str, keys: _Keys) -> Iterator[Row] | None:
    """Return the rows of a table; None if the text is not recognised as one."""
    first = re.match(r"[^\r\n]*", text)[0]  # type: ignore[index]
    if len(first) > _LONGEST_HEADER:
        return None
    found = (_with_header(first, delimiter, keys) for delimiter in _DELIMITERS)
    table = next((table for table in found if table is not None), None)
    table = _without_header(first, keys) if table is None else table
    if table is not None:
        return _table_rows(text, table, keys)
    if keys.caption or keys.image or keys.path.suffix.lower() in (".csv", ".tsv"):
        what = "columns of image and caption" if keys.with_images else "column of captions"
        raise keys.not_recognised(f"no {what} in its first line, {first[:200]!r}")
    return None


def _with_header(first: str, delimiter: str, keys: _Keys) -> _Table | None:
    names = next(_cells(first, delimiter), [])
    chosen = keys.choose(names)
    if chosen is None:
        return None
    image, caption = chosen
    if image is None and keys.caption is None and not all(re.fullmatch(r"[\w.-]*", name) for name in names):
        return None  # a line of text, such as "a sign with letters, text"
    place = None if image is None else names.index(image)
    return _Table(delimiter, True, place, names.index(caption), caption, len(names), names * keys.records)


def _without_header(first: str, keys: _Keys) -> _Table | None:
    """By column numbers, or where the first column is an image and the last one its caption."""
    for delimiter in _DELIMITERS:
        cells = next(_cells(first, delimiter), [])
        numbers = [int(key) if key and re.fullmatch("[0-9]{1,3}", key) else 0 for key in (keys.image, keys.caption)]
        if keys.caption is not None and len(cells) > 1 and 1 <= numbers[1] <= len(cells):
            if (keys.image is None and not keys.with_images) or 1 <= numbers[0] <= len(cells):
                image = numbers[0] - 1 if numbers[0] else None
                return _Table(delimiter, False, image, numbers[1] - 1, f"column {numbers[1]}", len(cells))
        elif keys.caption is None and keys.image is None and len(cells) > 1:
            column = 1 if delimiter == "," else len(cells) - 1  # captions may contain commas
            if is_image_name(_NUMBER_OF_CAPTION.sub("", cells[0])):
                return _Table(delimiter, False, 0, column, f"column {column + 1}", column + 1)
    return None


def _cells(text: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of each line. Quotes in a TSV may be literal: parsed as quoting, they would swallow lines."""
    plain = delimiter in "\t|"
    options = {"delimiter": delimiter, "quoting": csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL}
    for cells in csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, **options):  # type: ignore[arg-type]
        cells = [cell.strip() for cell in cells]
        yield [_unquoted(cell) for cell in cells] if plain else cells


def _unquoted(cell: str) -> str:
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if quoted else cell


def _table_rows(text: str, table: _Table, keys: _Keys) -> Iterator[Row]:
    number, cells = 0, [""]
    try:
        for number, cells in enumerate(_cells(text, table.delimiter), 1):
            if not any(cells) or (table.header and number == 1):
                continue
            yield _table_row(f"row {number}", cells, table)
    except csv.Error as error:
        raise UserError(f"--captions {keys.path}: row {number + 1} cannot be read ({error})") from error
    if cells and "\n" in cells[-1] and text.count('"') % 2:
        raise UserError(f"--captions {keys.path}: row {number} opens a quote that no other closes, and runs to the end")


def _table_row(name: str, cells: list[str], table: _Table) -> Row:
    if len(cells) > table.width and table.caption == table.width - 1:  # an unquoted caption with commas
        join = table.delimiter + " " * (table.delimiter in ",;")
        cells = [*cells[:table.caption], join.join(cells[table.caption:])]
    image = None
    if table.image is not None and table.image < len(cells):
        image = _NUMBER_OF_CAPTION.sub("", cells[table.image])
    if len(cells) != table.width:
        return Row(name, image, [], f"has {len(cells)} columns, not {table.width}")
    record = dict(zip(table.names, cells)) if table.names else None
    return _row(name, image, cells[table.caption], table.caption_name, record)
