"""Text tokenizers: YouTokenToMe, CLIP and character BPE vocabularies, and lists of classes, behind one interface (see
`bpe.tokenizer`)."""

import contextlib
import gzip
import io
import zlib
from pathlib import Path
from typing import Optional

from utils.errors import UserError

from .char_bpe import CharBpeTokenizer
from .classes import ClassTokenizer, is_class_header
from .clip import CLIP_VOCABULARY, ClipTokenizer, is_clip_header
from .tokenizer import MAX_VOCABULARY_BYTES, Tokenizer, read_vocabulary_bytes
from .yttm import YttmTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(bpe_path: Optional[str] = None) -> Tokenizer:
    """Return the tokenizer of a vocabulary file.

    None means the shipped CLIP vocabulary. A path is either a YouTokenToMe vocabulary (text) or a CLIP vocabulary
    (`bpe_simple_vocab_16e6.txt`, plain or gzip); which of the two, the content tells. A folder holds a character BPE
    vocabulary: `*-vocab.json` and `*-merges.txt`, as in minDALL-E's `tokenizer` folder. A file that begins with
    `#classes` lists classes (see `bpe.classes`).
    Raises `UserError` when the file is missing or is none of these.
    """
    path = CLIP_VOCABULARY if bpe_path is None else str(bpe_path)
    with contextlib.suppress(OSError):  # a name that is too long, a folder that cannot be read: said below
        if any(Path(path).glob("*vocab.json")):
            return CharBpeTokenizer(path)
    content = read_vocabulary_bytes(path)
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(MAX_VOCABULARY_BYTES + 1)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError("--bpe-path {}: damaged gzip file ({}); fetch it again".format(path, error)) from error
        if len(content) > MAX_VOCABULARY_BYTES:
            raise UserError("--bpe-path {}: unpacks to more than any vocabulary has".format(path))
    if is_class_header(content):
        return ClassTokenizer(content, path)
    if is_clip_header(content):
        return ClipTokenizer(content, path)
    return YttmTokenizer(content, path)
