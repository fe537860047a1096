"""Base class of tokenizers: text to ids, ids to text, and captions to one padded tensor.

A text is split into words, and each word is merged by ranked pairs (byte pair encoding), independently of its
neighbours. The `BPE` model of HF `tokenizers` does the merging, and its results are cached per word: captions use few
different words, so most are cache hits.
"""
from __future__ import annotations

import abc
import logging
from typing import TYPE_CHECKING, Any, Iterable, Sequence

from utils.errors import UserError
from utils.files import open_regular

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PAD_ID = 0  # in every vocabulary: the model turns each 0 of a text into the pad id of its position

# Limits of the cache of merged words: about 20 MB when full.
_MAX_KNOWN_WORDS = 1 << 16
_MAX_KNOWN_WORD_LEN = 64
_SHOWN = 8

MAX_VOCABULARY_BYTES = 1 << 26
"""Far above any vocabulary (the largest here has 3 MB); a video given by mistake is not read into memory."""


MAX_VOCABULARY_SIZE = 1 << 24
"""Largest number of ids: an embedding table for more would be too large."""


def whole_characters(text: str) -> str:
    """Return `text` with U+FFFD for lone surrogates (undecodable bytes of a command line)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_vocabulary_bytes(path: str) -> bytes:
    """Return the content of a vocabulary file. Raises `UserError` when it cannot be read or is absurdly large."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_VOCABULARY_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(
            f"--bpe-path {path}: no such file; learn a vocabulary with `python -m bpe.train` or use "
            "bpe/bpe_yttm_vocab.txt"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"--bpe-path {path}: cannot be read ({error})") from error
    if len(content) > MAX_VOCABULARY_BYTES:
        raise UserError(f"--bpe-path {path}: too large to be a vocabulary file")
    return content


class Tokenizer(abc.ABC):
    """Text to ids and back. Objects can be pickled (for loader workers); a copy rebuilds its tables on first use.

    Attributes: `vocab_size`, the number of ids, all of them in [0, vocab_size); `pad_id`, always 0.
    """

    pad_id: int = PAD_ID
    vocab_size: int

    def __init__(self, vocab_size: int, sha256: str) -> None:
        self.vocab_size = vocab_size
        self._sha256 = sha256
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._known_words: dict[str, list[int]] = {}
        self._model: Any = None  # tokenizers.models.BPE, built when the first word is merged

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_known_words"], state["_model"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_tables()

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, str]:
        """What a checkpoint stores to identify its tokenizer: "type" and "sha256" of the vocabulary's content."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Pads (0) and ids outside [0, vocab_size) are skipped."""

    @abc.abstractmethod
    def _split(self, text: str) -> Iterable[str]:
        """Return the words of `text`, in order."""

    @abc.abstractmethod
    def _build_model(self) -> Any:
        """Return the `tokenizers.models.BPE` of the vocabulary."""

    @abc.abstractmethod
    def _model_word(self, word: str) -> str:
        """Return `word` in the alphabet of `_model`'s vocabulary."""

    def _merge(self, word: str) -> list[int]:
        """Return the ids of one word."""
        if self._model is None:
            self._model = self._build_model()
        ids = self._word_ids(word)
        if len(self._known_words) < _MAX_KNOWN_WORDS and len(word) <= _MAX_KNOWN_WORD_LEN:
            self._known_words[word] = ids
        return ids

    def _word_ids(self, word: str) -> list[int]:
        """Return the ids of one word from `_model`."""
        try:
            tokens = self._model.tokenize(self._model_word(word))
        except UnicodeEncodeError:
            tokens = self._model.tokenize(self._model_word(whole_characters(word)))
        return [token.id for token in tokens]

    def unknown(self, text: str) -> list[str]:
        """Return the characters of `text` that the vocabulary lacks; by default, as with bytes, none."""
        return []

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without <bos>, <eos> or pads."""
        known_words = self._known_words
        ids: list[int] = []
        for word in self._split(text):
            word_ids = known_words.get(word)
            ids += self._merge(word) if word_ids is None else word_ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for each text."""
        return [self.encode(text) for text in texts]

    def tokenize(self, texts: str | Sequence[str], text_seq_len: int, truncate: bool = False) -> torch.Tensor:
        """Return the ids of B texts (one text counts as B = 1) as a LongTensor (B, text_seq_len), right-padded with 0.

        Raises `UserError` when a text has more than `text_seq_len` tokens, unless `truncate`.
        """
        import torch  # not at import: learning a vocabulary does not need it

        if isinstance(texts, str):
            texts = [texts]
        rows = []
        for text, ids in zip(texts, self.encode_batch(texts)):
            if len(ids) > text_seq_len and not truncate:
                shown = text if len(text) <= 200 else text[:200] + "..."
                raise UserError(
                    f"caption {shown!r} has {len(ids)} tokens, more than --text-seq-len {text_seq_len}: pass "
                    "--truncate-captions to cut it, or raise --text-seq-len"
                )
            rows.append(ids[:text_seq_len] + [PAD_ID] * (text_seq_len - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), text_seq_len)


def warn_of_unknown(tokenizer: Tokenizer, texts: Iterable[str], source: str, at_least: float = 0.01) -> float:
    """Return the fraction of characters in `texts` that the vocabulary lacks; warn if it is `at_least` this.

    source: origin of the texts, such as "--text". White space does not count.
    """
    total, unknown = 0, []
    for text in texts:
        total += len("".join(text.split()))
        unknown += tokenizer.unknown(text)
    share = len(unknown) / max(total, 1)
    if unknown and share >= at_least:
        logger.warning(
            "%s: the vocabulary lacks %.3g %% of the characters (such as %s), which the model sees as <UNK>; "
            "learn a vocabulary from such captions with python -m bpe.train, and train with it (--bpe-path)",
            source,
            100 * share,
            " ".join(list(dict.fromkeys(unknown))[:_SHOWN]),
        )
    return share
