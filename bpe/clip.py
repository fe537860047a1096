"""The vocabulary of CLIP: 49,408 ids over bytes, lower-cased text.

The text is repaired (ftfy), HTML entities are resolved twice, white space collapses to single spaces, letters become
lower case. A pattern then splits it into contractions, runs of letters, single digits and runs of anything else; the
bytes of each piece merge by rank, and `</w>` marks the end of a piece. This equals `SimpleTokenizer` of dalle-pytorch
and OpenAI's CLIP.

The file: a header, then one merge per line, of which the first 48,894 are used. Ids: 256 bytes, the same with `</w>`,
one per merge, <|startoftext|>, <|endoftext|>. Id 0, the pad, is also "!" within a piece, as in the original Mini
DALL-E. The <|startoftext|> and <|endoftext|> of CLIP's text encoder are not added.
"""
from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path
from typing import Any, Iterable

from utils.errors import UserError

from .tokenizer import PAD_ID, Tokenizer

CLIP_VOCABULARY = str(Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))

_HEADER = b'"bpe_simple_vocab_16e6.txt'
_NUM_MERGES = 48894
_WORD_END = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# (?i), as in CLIP, affects the classes too: U+0345, a mark that folds to a letter, then matches none of them, and
# vanishes. Keep that, and keep \p{L} out of brackets, where it would match that mark.
_PIECE = r"(?i)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Nearly every caption is plain: ASCII without control characters or "&". Then ftfy and html have nothing to do, and
# Python's `re` can split the text, which is several times faster.
_ASCII_PIECE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
_PLAIN_TEXT = re.compile(r"[\t\n\r -%'-~]*")


def is_clip_header(content: bytes) -> bool:
    """Whether a file with this (uncompressed) content claims to be the CLIP vocabulary."""
    return content.startswith(_HEADER)


def _byte_chars() -> list[str]:
    """Return the character for each byte in the file: itself if printable, else one from U+0100 on."""
    chars = []
    next_free = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            chars.append(chr(byte))
        else:
            chars.append(chr(next_free))
            next_free += 1
    return chars


_BYTE_CHARS = _byte_chars()


def parse_merges(content: bytes, path: str) -> list[tuple[str, str]]:
    """Return the merges of an uncompressed vocabulary file; `path` is for messages. Raises `UserError` if damaged."""
    try:
        lines = content.decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
    except UnicodeDecodeError as error:
        raise UserError(f"--bpe-path {path}: a damaged CLIP vocabulary ({error.reason})") from error
    merges = [tuple(line.split()) for line in lines]
    if len(merges) < _NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise UserError(
            f"--bpe-path {path}: a damaged CLIP vocabulary ({_NUM_MERGES} merges of two tokens are expected); "
            "download it again"
        )
    return [(left, right) for left, right in merges]


def clean(text: str) -> str:
    """Return `text` repaired, without HTML entities, with single spaces between words, in lower case."""
    if not _PLAIN_TEXT.fullmatch(text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class ClipTokenizer(Tokenizer):
    """The CLIP vocabulary (see the module). `content` is a file's, uncompressed; `path` is for messages."""

    def __init__(self, content: bytes, path: str) -> None:
        self._merges = parse_merges(content, path)
        texts = self._token_texts()
        known = set(texts)
        if len(known) != len(texts) or not all(left in known and right in known for left, right in self._merges):
            raise UserError(
                f"--bpe-path {path}: a damaged CLIP vocabulary (a token is duplicate or missing); download it again"
            )
        super().__init__(len(texts), hashlib.sha256(content).hexdigest())

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "clip", "sha256": self._sha256}

    def _forget_tables(self) -> None:
        super()._forget_tables()
        self._splitter: Any = None
        self._token_bytes: list[bytes] = []

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_splitter"], state["_token_bytes"]
        return state

    def _token_texts(self) -> list[str]:
        """Return the text of each id, as written in the file."""
        # Sorting puts printable bytes first, which is the order of the ids.
        alphabet = sorted(_BYTE_CHARS)
        texts = alphabet + [char + _WORD_END for char in alphabet]
        return texts + [left + right for left, right in self._merges] + [_START, _END]

    def _build_model(self) -> Any:
        from tokenizers import models

        ids = {text: id_ for id_, text in enumerate(self._token_texts())}
        return models.BPE(vocab=ids, merges=self._merges, end_of_word_suffix=_WORD_END)

    def _split(self, text: str) -> Iterable[str]:
        text = clean(text)
        if text.isascii():
            return _ASCII_PIECE.findall(text)
        if self._splitter is None:
            from tokenizers import Regex, pre_tokenizers

            # "removed" and "invert": what does not match the pattern, white space, is removed.
            self._splitter = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
        return [piece for piece, _ in self._splitter.pre_tokenize_str(text)]

    def _merge(self, word: str) -> list[int]:
        if word in (_START, _END):
            return [self.vocab_size - (2 if word == _START else 1)]
        return super()._merge(word)

    def _model_word(self, word: str) -> str:
        return "".join(map(_BYTE_CHARS.__getitem__, word.encode("utf-8")))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, pieces separated by spaces, without the two special ids."""
        if not self._token_bytes:
            bytes_of_chars = {char: byte for byte, char in enumerate(_BYTE_CHARS)}
            for text in self._token_texts()[:-2]:
                ends = text.endswith(_WORD_END)
                chars = text[: -len(_WORD_END)] if ends else text
                self._token_bytes.append(bytes(map(bytes_of_chars.__getitem__, chars)) + b" " * ends)
        pieces = [self._token_bytes[int(id_)] for id_ in ids if PAD_ID < int(id_) < len(self._token_bytes)]
        return b"".join(pieces).decode("utf-8", errors="replace").rstrip(" ")
