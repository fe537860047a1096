"""A Hugging Face `tokenizer.json`: any kind that the `tokenizers` package reads, with its own ids.

Chinese and multilingual vocabularies have this format: BERT's WordPiece, byte-level BPE, Unigram. Texts are encoded
without special tokens of language models ([CLS], <s>); truncation, padding and BPE dropout in the file are ignored.
Id 0 is the pad, as everywhere here; if another token has it, that token is treated as padding.
"""
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from typing import Any, Iterable

from utils.errors import UserError

from .tokenizer import MAX_VOCABULARY_SIZE, PAD_ID, Tokenizer, whole_characters

logger = logging.getLogger(__name__)

FILE_NAME = "tokenizer.json"


class HfTokenizer(Tokenizer):
    """A `tokenizer.json` (see the module). `content` is a file's, `path` is for messages."""

    def __init__(self, content: bytes, path: str) -> None:
        table = _parse(content, path)
        model = table["model"]
        if table.get("truncation") or table.get("padding") or model.get("dropout"):
            table.update(truncation=None, padding=None, model=dict(model, dropout=None))
            self._json = json.dumps(table, ensure_ascii=False)
        else:
            self._json = content.decode("utf-8")
        try:
            tokenizer = _read(self._json)
            ids: dict[str, int] = tokenizer.get_vocab()
            tokenizer.encode("a \ue000")  # fails if it cannot handle unknown characters
        except Exception as error:  # the package raises no specific class
            version = importlib.metadata.version("tokenizers")
            raise UserError(f"--bpe-path {path}: the package tokenizers {version} cannot read it: {error}") from error
        if not ids or max(ids.values()) >= MAX_VOCABULARY_SIZE:
            raise UserError(f"--bpe-path {path}: it has no tokens, or an id above {MAX_VOCABULARY_SIZE - 1}")
        super().__init__(max(ids.values()) + 1, hashlib.sha256(content).hexdigest())
        self._unk_id = ids.get(str(model.get("unk_token")), model.get("unk_id"))
        special = [token.get("id") for token in table.get("added_tokens") or () if token.get("special")]
        zero = tokenizer.id_to_token(PAD_ID)
        if zero is not None and (PAD_ID not in special or self._unk_id == PAD_ID):
            logger.warning("--bpe-path %s: %r has the id 0, which is the pad here: it is ignored", path, zero)

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "hf", "sha256": self._sha256}

    def _build_model(self) -> Any:
        return _read(self._json)

    def _encoded(self, text: str) -> Any:
        if self._model is None:
            self._model = self._build_model()
        return self._model.encode(whole_characters(text), add_special_tokens=False)

    # A text is one word: the file defines how to split it.

    def _split(self, text: str) -> Iterable[str]:
        return [text]

    def _word_ids(self, word: str) -> list[int]:
        ids: list[int] = self._encoded(word).ids
        return ids

    def _model_word(self, word: str) -> str:
        return word

    def unknown(self, text: str) -> list[str]:
        text = whole_characters(text)
        known: set[int] = set()
        encoded = self._encoded(text)
        for id_, (start, end) in zip(encoded.ids, encoded.offsets):
            if id_ != self._unk_id:
                known.update(range(start, end))
        return [char for place, char in enumerate(text) if place not in known and not char.isspace()]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` from the file's decoder, without special tokens."""
        if self._model is None:
            self._model = self._build_model()
        text: str = self._model.decode([int(id_) for id_ in ids if 0 < int(id_) < self.vocab_size])
        return text


def _read(text: str) -> Any:
    from tokenizers import Tokenizer as HfModel

    return HfModel.from_str(text)


def _parse(content: bytes, path: str) -> dict[str, Any]:
    """Return the table in a file. Raises `UserError` if it is not a `tokenizer.json`."""
    try:
        table = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--bpe-path {path}: damaged JSON ({str(error)[:100]})") from error
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        raise UserError(
            f"--bpe-path {path}: JSON, but not a {FILE_NAME} of Hugging Face (it has no 'model'); a character BPE "
            "vocabulary is given as the folder of its *vocab.json and *merges.txt"
        )
    return table
