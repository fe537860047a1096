"""Text tokenizers: YouTokenToMe, CLIP, character BPE and Hugging Face vocabularies, and lists of classes, behind one
interface (see `bpe.tokenizer`)."""
from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import zlib
from pathlib import Path

from utils.errors import UserError

from .char_bpe import CharBpeTokenizer
from .classes import ClassTokenizer, is_class_header
from .clip import CLIP_VOCABULARY, ClipTokenizer, is_clip_header
from .hf import FILE_NAME, HfTokenizer
from .tokenizer import MAX_VOCABULARY_BYTES, Tokenizer, read_vocabulary_bytes, warn_of_unknown
from .yttm import YttmTokenizer

__all__ = ["Tokenizer", "find_vocabulary", "load_tokenizer", "warn_of_unknown"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).resolve().parent


def find_vocabulary(path: str) -> str:
    """Return `path`, or the shipped vocabulary for a path of the original Mini DALL-E: `models/bpe/NAME`.

    This applies in the working directory and in the project folder, if `path` itself does not exist.
    """
    given = Path(path)
    folder, shipped = os.path.normpath(str(given.parent)), _FOLDER / given.name
    original = os.path.join("models", "bpe")
    if folder in (original, str(_FOLDER.parent / original)) and shipped.exists() and not os.path.exists(path):
        logger.info("vocabulary %s: using %s", path, shipped)
        return str(shipped)
    return path


def load_tokenizer(bpe_path: str | None = None) -> Tokenizer:
    """Return the tokenizer of a vocabulary file.

    None means the shipped CLIP vocabulary. A path is a YouTokenToMe vocabulary (text), a CLIP vocabulary
    (`bpe_simple_vocab_16e6.txt`, plain or gzip) or a `tokenizer.json` of Hugging Face (see `bpe.hf`), recognised by
    content. A folder holds a `tokenizer.json`, or a character BPE vocabulary: `*-vocab.json` and `*-merges.txt`, as in
    minDALL-E's `tokenizer` folder. A file that begins with `#classes` is a list of classes (see `bpe.classes`). See
    `find_vocabulary` for paths of the original Mini DALL-E. Raises `UserError` when the file is missing or invalid.
    """
    path = CLIP_VOCABULARY if bpe_path is None else find_vocabulary(str(bpe_path))
    with contextlib.suppress(OSError):  # a name that is too long, an unreadable folder: reported below
        if (Path(path) / FILE_NAME).is_file():
            path = os.path.join(path, FILE_NAME)
        elif any(Path(path).glob("*vocab.json")):
            return CharBpeTokenizer(path)
        elif Path(path).is_dir():
            raise UserError(f"--bpe-path {path}: a folder without {FILE_NAME}, or *-vocab.json and *-merges.txt")
    content = read_vocabulary_bytes(path)
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(MAX_VOCABULARY_BYTES + 1)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"--bpe-path {path}: damaged gzip file ({error}); download it again") from error
        if len(content) > MAX_VOCABULARY_BYTES:
            raise UserError(f"--bpe-path {path}: too large to be a vocabulary when unpacked")
    if is_class_header(content):
        return ClassTokenizer(content, path)
    if is_clip_header(content):
        return ClipTokenizer(content, path)
    if content.lstrip()[:1] == b"{":
        return HfTokenizer(content, path)
    return YttmTokenizer(content, path)
