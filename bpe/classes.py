"""Class names as a vocabulary: a "text" is one class, or none. For image models without captions.

The file is `#classes N`, then N lines with one name each. Class k (from 0, in file order) has the id k + 1; 0, the pad
id elsewhere, means no class. A vocabulary without classes belongs to an unconditional model: all texts are empty.
"""
from __future__ import annotations

import hashlib
import re
from typing import Any, Iterable, Sequence

from utils.errors import UserError, nearest

from .tokenizer import Tokenizer

_HEADER = re.compile(rb"#classes (\d{1,7})\r?\n")
_SHOWN = 8  # names in a message


def is_class_header(content: bytes) -> bool:
    """Whether the content of a file begins like a list of classes."""
    return content.startswith(b"#classes ")


def class_file(names: Sequence[str]) -> bytes:
    """Return the content of a vocabulary file. Raises `UserError` for invalid names."""
    for name in names:
        if not name.strip() or name != name.strip() or len(name.splitlines()) != 1:
            raise UserError(
                f"{name!r} cannot be a class name: it is blank, has spaces at an end, or line breaks"
            )
    lines = [f"#classes {len(names)}", *names]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


class ClassTokenizer(Tokenizer):
    """A list of classes (see the module). `content` is a file's, `path` is for messages."""

    def __init__(self, content: bytes, path: str) -> None:
        header = _HEADER.match(content)
        names = content[header.end() :].decode("utf-8", "surrogateescape").splitlines() if header else []
        if header is None or len(names) != int(header.group(1)):
            raise UserError(
                f"--bpe-path {path}: not a list of classes: `#classes N` needs N names after it, one per line"
            )
        if len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise UserError(f"--bpe-path {path}: a class name is duplicate or blank")
        super().__init__(len(names) + 1, hashlib.sha256(content).hexdigest())
        self.classes: list[str] = names
        self._ids = {name: index + 1 for index, name in enumerate(names)}

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "classes", "sha256": self._sha256}

    def _split(self, text: str) -> Iterable[str]:
        return [text.strip()] if text.strip() and self.classes else []

    def _merge(self, word: str) -> list[int]:
        """Return the id of a class: by its name, otherwise by its number from 0."""
        if word in self._ids:
            return [self._ids[word]]
        if re.fullmatch("[0-9]{1,7}", word) and int(word) < len(self.classes):
            return [int(word) + 1]
        shown = ", ".join(self.classes[:_SHOWN]) + (", ..." if len(self.classes) > _SHOWN else "")
        raise UserError(
            f"{word[:80]!r} is not a class of this model.{nearest(word, self.classes)} It has {len(self.classes)} (0 "
            f"to {len(self.classes) - 1}): {shown}"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the name of the class."""
        return " ".join(self.classes[int(id_) - 1] for id_ in ids if 0 < int(id_) < self.vocab_size)

    # A class is one token: there is nothing to merge.

    def _build_model(self) -> Any:
        return None

    def _model_word(self, word: str) -> str:
        return word
