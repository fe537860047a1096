"""Output folders of prompts: no prompt and no link can place them outside the outputs folder.

    <outputs folder>/<prompt with _ for spaces, 100 characters at most>/
        0.jpg, 1.jpg, ..., caption.txt, grid.png, generation.json

Repeating a prompt replaces all its earlier images: files listed in the earlier generation.json are deleted when the
first new image is ready. Files that it does not list are never deleted, only reported.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from torch import Tensor

from dalle.pictures import FORMATS, GRID_LIMIT, make_grid, save_picture, to_pil
from utils.errors import UserError
from utils.files import atomic_write, writing
from utils.locks import try_lock

logger = logging.getLogger(__name__)

MAX_NAME_LEN = 100
"""Characters of a folder name."""
_MAX_NAME_BYTES = 240  # file systems allow 255 bytes, and a character may take four
_IMAGE_NAME = re.compile(rf"[0-9]{{1,9}}\.(?:{'|'.join(FORMATS)})")
# Names that are reserved on some systems, with any extension.
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_REPORT, GRID = "generation.json", "grid.png"
_CANNOT = "--outputs-dir: cannot write"


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


class PromptFolder:
    """The files of one prompt. They are consistent after each `add`: an interrupted run keeps its images."""

    def __init__(
        self, outputs_dir: Path, prompt: str, taken: set[str], image_format: str, about: dict[str, Any]
    ) -> None:
        """Make the folder and lock it for this process. Raises UserError where that is impossible.

        taken: `_folded` names of this run's folders; the new one is added. about: further entries of generation.json.
        """
        self.prompt, self.format, self.about = prompt, image_format, about
        self.path = outputs_dir / _free_name(outputs_dir, prompt, taken)
        taken.add(_folded(self.path.name))
        self._images: list[dict[str, Any]] = []
        self._grid: list[Tensor] = []
        self._started = False
        with writing(_CANNOT, self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = try_lock(self.path)
        if lock is None:
            raise UserError(
                f"--outputs-dir: another process is writing images into {self.path}; wait for it, or choose another "
                "--outputs-dir"
            )
        self._lock = lock

    def add(
        self,
        images: Tensor,
        seeds: Sequence[int],
        codes: Tensor,
        log_likelihood: Tensor,
        notes: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Write images (B, 3, S, S) uint8, numbered after the last one, and record their seeds and codes (B, N).

        notes: further entries for each image.
        """
        if not self._started:
            self._start()
        with writing(_CANNOT, self.path):
            rows = zip(images, seeds, codes.tolist(), log_likelihood.tolist(), notes or [{}] * len(seeds))
            for image, seed, row, likelihood, note in rows:
                name = f"{len(self._images)}.{self.format}"
                save_picture(to_pil(image), self.path / name)
                if len(self._grid) < GRID_LIMIT:
                    self._grid.append(image)
                self._images.append(
                    dict(
                        note,
                        file=name,
                        seed=seed,
                        codes=row,
                        log_likelihood=likelihood if math.isfinite(likelihood) else None,
                    )
                )
            self._write_report(complete=False)

    def finish(self, **about: Any) -> None:
        """Write the grid, and mark the run as complete in generation.json, with `about` added."""
        self.about.update(about)
        with writing(_CANNOT, self.path):
            save_picture(make_grid(self._grid, self.prompt), self.path / GRID)
            self._write_report(complete=True)
        self._lock.close()

    def _start(self) -> None:
        """Delete an earlier run's images, now that there is a new one, and write the caption."""
        with writing(_CANNOT, self.path):
            for name in _listed(self.path):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).unlink()
            unlisted = sorted(path.name for path in self.path.iterdir() if _IMAGE_NAME.fullmatch(path.name))
            if unlisted:
                logger.warning(
                    "%s already has %s that no %s lists: kept unless a new image has the same name",
                    self.path,
                    unlisted[0] if len(unlisted) == 1 else f"{len(unlisted)} images",
                    _REPORT,
                )
            with atomic_write(self.path / "caption.txt") as file:
                file.write(_writable(self.about.get("caption", self.prompt)) + "\n")
        self._started = True

    def _write_report(self, complete: bool) -> None:
        head = dict({"prompt": self.prompt, "complete": complete}, **self.about)
        # One line per key and per image: json's indent would give each code its own line.
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()
        ]
        rows = ["    " + json.dumps(image) for image in self._images]
        with atomic_write(self.path / _REPORT) as file:
            text = '{{\n{},\n  "images": [\n{}\n  ]\n}}\n'.format(",\n".join(lines), ",\n".join(rows))
            file.write(_writable(text))


def _writable(text: str) -> str:
    """Escape lone surrogates (undecodable bytes of a path), which UTF-8 lacks, as JSON does: \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_folders(outputs_dir: Path, prompts: Iterable[str]) -> None:
    """Raise UserError if the folder of one of these prompts is not available, before hours of sampling."""
    taken: set[str] = set()
    for prompt in prompts:
        taken.add(_folded(_free_name(outputs_dir, prompt, taken)))


def _free_name(outputs_dir: Path, prompt: str, taken: set[str]) -> str:
    """The prompt's folder name, with a digest if another prompt of this or an earlier run has the same name."""
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
            return candidate
    raise UserError(
        f"--outputs-dir {outputs_dir}: the folder {candidate} belongs to another prompt; delete it or choose another "
        "--outputs-dir"
    )


def _folded(name: str) -> str:
    """The name as compared by file systems that ignore case and Unicode normalisation."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _report(folder: Path) -> dict[str, Any]:
    """An earlier run's generation.json; empty if there is none, or it is not ours."""
    try:
        with open(str(folder / _REPORT), encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _owner(folder: Path) -> str | None:
    """The prompt of an existing folder, if recorded."""
    prompt = _report(folder).get("prompt")
    return prompt if isinstance(prompt, str) else None


def _listed(folder: Path) -> Iterator[str]:
    """Files of an earlier run that the new one replaces."""
    images = _report(folder).get("images")
    for image in images if isinstance(images, list) else ():
        name = image.get("file") if isinstance(image, dict) else None
        if isinstance(name, str) and _IMAGE_NAME.fullmatch(name):
            yield name
    if images is not None:
        yield "grid.png"
        yield _REPORT
