"""Character BPE vocabularies of HF `tokenizers`, as in minDALL-E: lower-cased, `</w>` ends a word.

A folder holds two files: `*-vocab.json`, {"token": id}, and `*-merges.txt`, a merge of two tokens per line, best rank
first. Text is cleaned as in BERT (control characters are removed, white space becomes spaces, Chinese characters are
separate words, accents are kept), lower-cased, and split at white space and around punctuation. A character that the
vocabulary lacks is [UNK] (1), and [PAD] is 0. Both names stand for their ids in texts, too. This equals
`CharBPETokenizer(..., unk_token="[UNK]", lowercase=True)` with the special token [PAD].
"""
from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Iterable

from utils.errors import UserError
from utils.files import PathLike, atomic_write

from .tokenizer import MAX_VOCABULARY_SIZE, PAD_ID, Tokenizer, read_vocabulary_bytes, whole_characters

PAD, UNK = "[PAD]", "[UNK]"
_SPECIAL = re.compile(r"(\[PAD\]|\[UNK\])")
WORD_END = "</w>"


def _only_file(folder: Path, pattern: str) -> str:
    """Return the only matching file. Raises `UserError` when there is none, or more than one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"--bpe-path {folder}: a folder must hold one file {pattern} (a character BPE vocabulary), not {len(found)}"
        )
    return str(found[0])


def parse_vocabulary(content: bytes, path: str) -> dict[str, int]:
    """Return {token: id} of a vocabulary file; `path` is for messages. Raises `UserError` if it is invalid."""
    try:
        vocabulary = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--bpe-path {path}: not JSON ({error})") from error
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise UserError(f"--bpe-path {path}: not a table of tokens")
    ids = list(vocabulary.values())
    if any(isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < MAX_VOCABULARY_SIZE for id_ in ids):
        raise UserError(f"--bpe-path {path}: its ids must be whole numbers from 0")
    if len(set(ids)) != len(ids):
        raise UserError(f"--bpe-path {path}: two tokens have the same id")
    if vocabulary.get(PAD) != PAD_ID or UNK not in vocabulary:
        raise UserError(f"--bpe-path {path}: it needs the tokens {PAD} with id 0 and {UNK}")
    return vocabulary


def parse_merges(content: bytes, vocabulary: dict[str, int], path: str) -> list[tuple[str, str]]:
    """Return the merges of a file, best first; `path` is for messages. Raises `UserError` if damaged."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--bpe-path {path}: not UTF-8 text (byte {error.start})") from error
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"--bpe-path {path}: line {number} is not a merge of two tokens")
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"--bpe-path {path}: line {number} merges tokens that the vocabulary lacks")
        merges.append((left, right))
    return merges


def write_files(folder: PathLike, vocabulary: bytes, merges: bytes) -> None:
    """Write a vocabulary's two files under minDALL-E's names. Creates the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in (("bpe-16k-vocab.json", vocabulary), ("bpe-16k-merges.txt", merges)):
        with atomic_write(Path(folder) / name, "wb") as file:
            file.write(content)


class Words:
    """Splits a text into cleaned, lower-cased words."""

    def __init__(self) -> None:
        from tokenizers import normalizers, pre_tokenizers

        self._normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
        self._splitter = pre_tokenizers.BertPreTokenizer()

    def of(self, text: str) -> list[str]:
        """Return the words of a text, in order."""
        text = self._normalizer.normalize_str(whole_characters(text))  # the normalizer removes U+FFFD
        return [word for word, _ in self._splitter.pre_tokenize_str(text)]


class CharBpeTokenizer(Tokenizer):
    """The vocabulary of a folder (see the module)."""

    def __init__(self, folder: str) -> None:
        vocabulary_path = _only_file(Path(folder), "*vocab.json")
        merges_path = _only_file(Path(folder), "*merges.txt")
        content, merges = read_vocabulary_bytes(vocabulary_path), read_vocabulary_bytes(merges_path)
        self._vocabulary = parse_vocabulary(content, vocabulary_path)
        self._merges = parse_merges(merges, self._vocabulary, merges_path)
        self._texts = {id_: text for text, id_ in self._vocabulary.items()}
        self._files = (content, merges)
        super().__init__(max(self._texts) + 1, hashlib.sha256(content + b"\0" + merges).hexdigest())

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "char_bpe", "sha256": self._sha256}

    def save(self, folder: PathLike) -> None:
        """Write the two files unchanged, under minDALL-E's names."""
        write_files(folder, *self._files)

    def _forget_tables(self) -> None:
        super()._forget_tables()
        self._words: Words | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_words"]
        return state

    def _build_model(self) -> Any:
        from tokenizers import models

        return models.BPE(vocab=self._vocabulary, merges=self._merges, unk_token=UNK, end_of_word_suffix=WORD_END)

    def _split(self, text: str) -> Iterable[str]:
        if self._words is None:
            self._words = Words()
        words: list[str] = []
        for piece in _SPECIAL.split(text):
            words += [piece] if piece in (PAD, UNK) else self._words.of(piece)
        return words

    def _merge(self, word: str) -> list[int]:
        if word in (PAD, UNK):  # other words never combine brackets and letters
            return [self._vocabulary[word]]
        return super()._merge(word)

    def _model_word(self, word: str) -> str:
        return word

    def unknown(self, text: str) -> list[str]:
        words = [word for word in self._split(text) if word not in (PAD, UNK)]
        tokens = [token for word in words for token in (*word[:-1], word[-1] + WORD_END)]
        return [token[0] for token in tokens if token not in self._vocabulary]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, words separated by spaces, without [PAD] and [UNK]."""
        texts = [self._texts.get(int(id_), PAD) for id_ in ids]
        return "".join(text for text in texts if text not in (PAD, UNK)).replace(WORD_END, " ").rstrip(" ")
