"""Scores of sampled images by functions that the user names: --scorer module:function.

    def sharpness(images, captions, records):           # uint8 (B, 3, S, S), list[str], list[dict]
        return [{"sharpness": float(image.float().var())} for image in images]

A scorer returns a dictionary of numbers for each image, empty where it does not apply. A record is the caption's entry
in --prompts-file. examples/scorers.py has an example.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import sha256_file

Scorer = Callable[[Tensor, "list[str]", "list[dict[str, Any]]"], Any]

CATEGORIES = ("category", "tag", "challenge")
"""Keys of records, in any case, whose values scores are averaged by: GenEval's, DrawBench's and PartiPrompts'."""


def load_scorer(name: str) -> Scorer:
    """The function of "module:function"; modules may be in the working directory. Raises UserError."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"--scorer {name}: give a module and a function of it, as in examples.scorers:colour_names")
    with _in_one_line(name), _working_directory():
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise UserError(f"--scorer {name}: {function} is not a function")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Modules of the working directory can be imported within the context."""
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Any error of the user's code becomes one line that names the scorer and the place."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}, line {last.lineno}"
        raise UserError(f"--scorer {name}: {type(error).__name__}: {error} ({place})") from error


class Scorers:
    """The functions of --scorer."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: module:function of each. Raises UserError."""
        self.names = tuple(names)
        self._scorers = {name: load_scorer(name) for name in names}

    @property
    def identity(self) -> dict[str, str | None]:
        """The SHA-256 of the file of each, if it has one."""
        files = {name: getattr(sys.modules.get(name.partition(":")[0]), "__file__", None) for name in self.names}
        return {name: None if file is None else sha256_file(Path(file)) for name, file in files.items()}

    def score(
        self, images: Tensor, captions: Sequence[str], records: Sequence[dict[str, Any]]
    ) -> list[dict[str, float]]:
        """The scores of each image, uint8 (n, 3, S, S), with a caption and a record of each. Raises UserError."""
        found: list[dict[str, float]] = [{} for _ in captions]
        for name, scorer in self._scorers.items():
            with _in_one_line(name):
                rows = _checked(name, scorer(images.clone(), list(captions), list(records)), len(images))
            for scores, row in zip(found, rows):
                scores.update(row)
        return found


def as_bytes(rows: Sequence[dict[str, float]]) -> Tensor:
    """Scores as JSON lines, uint8 (bytes,): those of several batches can be concatenated."""
    return torch.tensor(list("".join(json.dumps(row) + "\n" for row in rows).encode("ascii")), dtype=torch.uint8)


def from_bytes(lines: Tensor) -> list[dict[str, float]]:
    """The inverse of `as_bytes`."""
    return [json.loads(line) for line in bytes(lines.tolist()).splitlines()]


def summary(rows: Iterable[dict[str, float]], records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """{score: {"mean", "count", "by": {key: {value: {"mean", "count"}}}}} of images; count: of images."""
    both = list(zip(rows, records))
    names = dict.fromkeys(name for scores, _ in both for name in scores)
    return {name: _about([(scores[name], record) for scores, record in both if name in scores]) for name in names}


def _about(rows: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    by: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score, record in rows:
        for key, value in record.items():
            if key.lower() in CATEGORIES and isinstance(value, str):
                by[key][value].append(score)
    parts = {key: {value: _mean(own) for value, own in groups.items()} for key, groups in by.items()}
    return {**_mean([score for score, _ in rows]), "by": parts}


def _mean(scores: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(scores) / len(scores), "count": len(scores)}


def _checked(name: str, rows: Any, count: int) -> list[dict[str, float]]:
    """What a scorer returned, as finite floats."""
    if not isinstance(rows, (list, tuple)) or len(rows) != count or not all(isinstance(row, dict) for row in rows):
        what = f"{len(rows)} items" if isinstance(rows, (list, tuple)) else type(rows).__name__
        raise UserError(f"--scorer {name}: must return a dictionary for each of {count} images, not {what}")
    found = [{str(key): float(value) for key, value in row.items()} for row in rows]
    bad = next((key for row in found for key, value in row.items() if not math.isfinite(value)), None)
    if bad is not None:
        raise UserError(f"--scorer {name}: {bad!r} is not a finite number")
    return found


def scores_report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The scores as lines of a table, a column for each guidance scale."""
    lines = []
    for name, first in rows[0].items():
        columns = [row.get(name) or {"mean": math.nan, "by": {}} for row in rows]
        lines.append(_line(f"{name}, {first['count']} images", columns))
        for key, groups in first["by"].items():
            for value, own in groups.items():
                parts = [column["by"].get(key, {}).get(value, {"mean": math.nan}) for column in columns]
                lines.append(_line(f"  {key} {value}, {own['count']} images", parts))
    return lines


def _line(label: str, columns: Sequence[dict[str, Any]]) -> str:
    return f"{label:<48}" + "".join(f"{column['mean']:>12.4g}" for column in columns)
