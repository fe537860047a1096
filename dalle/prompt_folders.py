"""Folders of prompts: no prompt and no link can place them outside the outputs folder.

Each prompt has one of its own, also where names of prompts differ in nothing that a file system sees.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Iterable

from utils.errors import UserError
from utils.files import writing
from utils.locks import Lock, try_lock

MAX_NAME_LEN = 100
"""Characters of a folder name."""
REPORT = "generation.json"
CANNOT = "--outputs-dir: cannot write"
_MAX_NAME_BYTES = 240  # file systems allow 255 bytes, and a character may take four
# Names that are reserved on some systems, with any extension.
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def folder_name(prompt: str) -> str:
    """The folder name of a prompt: spaces become _, truncated to 100 characters.

    Unsafe parts (slashes, control characters, a leading dot or dash, ...) also become _; such a name ends in a digest
    of the prompt, which makes it unique.
    """
    plain = prompt[:MAX_NAME_LEN].replace(" ", "_")
    safe = "".join("_" if _is_unsafe(character) else character for character in plain)
    if safe[:1] in ("-", ".", "~"):
        safe = "_" + safe[1:]
    if not safe or _RESERVED.fullmatch(safe):
        safe = "_" + safe
    if safe != plain:
        return with_digest(safe, prompt)
    return safe if len(safe.encode("utf-8")) <= _MAX_NAME_BYTES else _truncated(safe, MAX_NAME_LEN, _MAX_NAME_BYTES)


def with_digest(name: str, prompt: str, length: int = 8) -> str:
    """Return the name, truncated if needed, with `length` digits of a digest of the whole prompt."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:length]
    return _truncated(name, MAX_NAME_LEN - length - 1, _MAX_NAME_BYTES - length - 1) + "-" + digest


def _is_unsafe(character: str) -> bool:
    """Separators and invisible characters: control characters, line ends, lone surrogates, direction marks."""
    if character in "/\\":
        return True
    if character == "\u200d":  # joins the parts of one emoji
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or (
        character.isspace() and character != " "
    )


def _truncated(name: str, characters: int, size: int) -> str:
    return name[:characters].encode("utf-8")[:size].decode("utf-8", "ignore")


def prompt_folders(outputs_dir: Path, prompts: Iterable[str]) -> list[Path]:
    """The folder of each prompt. Raises UserError if one is not available, before hours of sampling."""
    taken: set[str] = set()
    return [_free_folder(outputs_dir, prompt, taken) for prompt in prompts]


def lock_folder(folder: Path) -> Lock:
    """Make the folder and lock it for this process. Raises UserError where that is impossible."""
    with writing(CANNOT, folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder)
    if lock is None:
        raise UserError(
            f"--outputs-dir: another process is writing images into {folder}; wait for it, or choose another "
            "--outputs-dir"
        )
    return lock


def _free_folder(outputs_dir: Path, prompt: str, taken: set[str]) -> Path:
    """The prompt's folder, named with a digest if another prompt of this or an earlier run has the same name."""
    name = folder_name(prompt)
    for candidate in (name, with_digest(name, prompt), with_digest(name, prompt, 64)):
        if _folded(candidate) in taken:
            continue
        if os.path.islink(str(outputs_dir / candidate)):
            raise UserError(
                f"--outputs-dir: {outputs_dir / candidate} is a symbolic link, and what it points to is never "
                "replaced; remove it or choose another --outputs-dir"
            )
        if _owner(outputs_dir / candidate) in (None, prompt):
            taken.add(_folded(candidate))
            return outputs_dir / candidate
    raise UserError(
        f"--outputs-dir {outputs_dir}: the folder {candidate} belongs to another prompt; delete it or choose another "
        "--outputs-dir"
    )


def _folded(name: str) -> str:
    """The name as compared by file systems that ignore case and Unicode normalisation."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def read_report(folder: Path) -> dict[str, Any]:
    """An earlier run's generation.json; empty if there is none, or it is not ours."""
    try:
        with open(str(folder / REPORT), encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _owner(folder: Path) -> str | None:
    """The prompt of an existing folder, if recorded."""
    prompt = read_report(folder).get("prompt")
    return prompt if isinstance(prompt, str) else None
