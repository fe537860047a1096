"""Files of prompts: one a line, or a list of entries with more about each, as benchmarks have them.

    GenEval         evaluation_metadata.jsonl: {"tag": "colors", "include": [...], "prompt": "a photo of a red car"}
    DrawBench       CSV with the columns Prompts and Category
    PartiPrompts    TSV with the columns Prompt, Category, Challenge and Note

Other lists are recognised as in utils/caption_lists.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from utils.caption_lists import find_list, read_text
from utils.errors import UserError


class Prompt(NamedTuple):
    """A prompt and all of its entry in the file."""

    text: str
    record: dict[str, Any]
    """Keys or columns and their values; of a line: {"prompt": text}."""


def read_prompts(file: str, key: str | None = None, flag: str = "--prompts-file") -> list[Prompt]:
    """The prompts of a file, stripped, without empty ones. key: JSON key or column of the prompt, not the usual ones.

    Raises UserError that names the flag.
    """
    path = Path(file)
    if not path.exists():
        raise UserError(f"{flag} {file}: no such file")
    try:
        text = read_text(path)
        found = None
        if key is not None or not _is_plain(path, text):
            found = find_list(path, text, None, key, with_images=False, records=True)
    except UserError as error:
        raise UserError(str(error).replace("--captions", flag, 1)) from error
    if found is None:
        return [Prompt(line, {"prompt": line}) for line in map(str.strip, text.splitlines()) if line]
    prompts = []
    for row in found.rows:
        if row.problem:
            raise UserError(f"{flag} {file}: {row.name} {row.problem}")
        texts = (caption.strip() for caption in row.captions)
        prompts += [Prompt(text, row.record or {"prompt": text}) for text in texts if text]
    return prompts


def _is_plain(path: Path, text: str) -> bool:
    """Whether the first line has no columns: a single word may be a prompt or the name of a column."""
    first = re.match(r"\s*([^\r\n]*)", text)[1]  # type: ignore[index]
    return not (set(first) & set("\t,|;[{") or path.suffix.lower() in (".csv", ".tsv"))
