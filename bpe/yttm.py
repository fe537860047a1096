"""YouTokenToMe vocabularies in their text format; encoding equals youtokentome 1.0.6.

The format consists of decimal numbers:
    num_chars num_merges
    code_point id                  num_chars times
    left_id right_id result_id     num_merges times, best rank first
    unk_id pad_id bos_id eos_id
Encoding: the text is split into words at white space, each word is prefixed with U+2581, and adjacent tokens merge,
best rank and then leftmost first. White space is tab, line feed, vertical tab, form feed, carriage return, space and
U+2581 itself only: a no-break space is an ordinary character. A run of unknown characters becomes one <UNK>. Nothing is
lower-cased or normalised.
"""
from __future__ import annotations

import hashlib
import re
from typing import Any, Iterable, NamedTuple

from utils.errors import UserError

from .tokenizer import PAD_ID, Tokenizer

WORD_START = "\u2581"
_SPACES = "\t-\r " + WORD_START
_WORD = re.compile(f"[^{_SPACES}]+")
_IS_SPACE = re.compile(f"[{_SPACES}]")

_MAX_CHARACTERS = 1 << 25  # total length of all tokens: real ones have some 10 each

# Names of <UNK> in the merging model and of specials in decoded text. The first contains a space, which no word can, so
# it never equals the text of a token.
_UNK_KEY = "unknown characters"
_SPECIAL_TEXTS = {"unk": "<UNK>", "bos": "<BOS>", "eos": "<EOS>"}


class YttmVocabulary(NamedTuple):
    """The content of a vocabulary file."""

    chars: list[tuple[str, int]]
    """(character, id)."""
    merges: list[tuple[int, int, int]]
    """(left id, right id, result id), best rank first."""
    specials: dict[str, int]
    """Ids of "unk", "pad", "bos", "eos"; -1 for one that the vocabulary lacks (never unk or pad)."""

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.chars) + len(self.merges) + sum(id_ >= 0 for id_ in self.specials.values())


def split_words(text: str) -> list[str]:
    """Return the words of `text` as in youtokentome, without the U+2581 prefix."""
    return _WORD.findall(text)


def format_vocabulary(vocabulary: YttmVocabulary) -> str:
    """Return the text of a vocabulary file."""
    lines = [f"{len(vocabulary.chars)} {len(vocabulary.merges)}"]
    lines += [f"{ord(char)} {id_}" for char, id_ in vocabulary.chars]
    lines += ["{} {} {}".format(*merge) for merge in vocabulary.merges]
    lines.append(" ".join(str(vocabulary.specials[name]) for name in ("unk", "pad", "bos", "eos")))
    return "\n".join(lines) + "\n"


def parse_vocabulary(content: bytes, path: str) -> YttmVocabulary:
    """Parse a vocabulary file; `path` is for messages. Raises `UserError` if it is invalid."""

    def wrong(what: str) -> UserError:
        return UserError(
            f"--bpe-path {path}: {what}; give a YouTokenToMe vocabulary, such as one from `python -m bpe.train`"
        )

    if not content.strip():
        raise wrong("the file is empty")
    if not re.fullmatch(rb"[-0-9\s]*", content):
        raise wrong("not a vocabulary file (it does not consist of numbers)")
    if re.search(rb"[0-9]{25}", content):  # very long integers are slow to parse
        raise wrong("not a vocabulary file (a number has too many digits)")
    try:
        numbers = [int(number) for number in content.split()]
    except ValueError as error:
        raise wrong(f"not a vocabulary file ({str(error)[:100]})") from error
    if len(numbers) < 2 or numbers[0] < 1 or numbers[1] < 0:
        raise wrong("not a vocabulary file (its first line is not 'num_chars num_merges')")
    num_chars, num_merges = numbers[:2]
    expected = 2 + 2 * num_chars + 3 * num_merges + 4
    if len(numbers) != expected:
        raise wrong(
            f"{len(numbers)} numbers, but its first line ({num_chars} characters and {num_merges} merges) requires "
            f"{expected} (truncated or damaged)"
        )
    end = 2 + 2 * num_chars
    code_points = numbers[2:end:2]
    for code_point in code_points:
        valid = 0 <= code_point < 0xD800 or 0xDFFF < code_point < 0x110000
        if not valid or (_IS_SPACE.match(chr(code_point)) and chr(code_point) != WORD_START):
            raise wrong(f"{code_point} is not the code point of a character")
    if len(set(code_points)) != num_chars:
        raise wrong("a duplicate character")
    if ord(WORD_START) not in code_points:
        raise wrong(f"the word start U+2581 ({ord(WORD_START)}) is not among its characters")
    chars = list(zip(map(chr, code_points), numbers[3:end:2]))
    merges = list(zip(numbers[end:-4:3], numbers[end + 1 : -4 : 3], numbers[end + 2 : -4 : 3]))
    specials = dict(zip(("unk", "pad", "bos", "eos"), numbers[-4:]))
    vocabulary = YttmVocabulary(chars, merges, specials)
    _check_ids(vocabulary, wrong)
    return vocabulary


def _check_ids(vocabulary: YttmVocabulary, wrong: Any) -> None:
    """Raise `wrong(...)` unless the ids are 0 to size - 1, once each, and merges join known tokens."""
    specials = vocabulary.specials
    if specials["pad"] != PAD_ID:
        raise wrong("its pad id is {}, the model needs {}".format(specials["pad"], PAD_ID))
    if specials["unk"] < 0:
        raise wrong("it has no id for unknown characters")
    seen = set()
    present = [id_ for id_ in specials.values() if id_ != -1]
    for id_ in present + [id_ for _, id_ in vocabulary.chars] + [merge[2] for merge in vocabulary.merges]:
        if not 0 <= id_ < vocabulary.size:
            raise wrong(f"id {id_} is not in [0, {vocabulary.size})")
        if id_ in seen:
            raise wrong(f"id {id_} is used twice")
        seen.add(id_)
    texts = {id_: char for char, id_ in vocabulary.chars}
    seen_texts, total = set(), 0
    for left, right, result in vocabulary.merges:
        if left not in texts or right not in texts:
            raise wrong(f"merge {left} {right} {result} joins a token that no earlier line defines")
        texts[result] = texts[left] + texts[right]
        total += len(texts[result])
        if total > _MAX_CHARACTERS:  # each merge may double a token's length
            raise wrong("its tokens are too long")
        # Learned merges never produce one text in two ways, and the merging model identifies tokens by text.
        if texts[result] in seen_texts:
            raise wrong(f"two tokens stand for {texts[result]!r}")
        seen_texts.add(texts[result])


class YttmTokenizer(Tokenizer):
    """A YouTokenToMe vocabulary (see the module). `content` is a file's, `path` is for messages."""

    def __init__(self, content: bytes, path: str) -> None:
        self._vocabulary = parse_vocabulary(content, path)
        self._characters = frozenset(char for char, _ in self._vocabulary.chars)
        super().__init__(self._vocabulary.size, hashlib.sha256(content).hexdigest())

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "yttm", "sha256": self._sha256}

    def _forget_tables(self) -> None:
        super()._forget_tables()
        self._texts: dict[int, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_texts"]
        return state

    def _token_texts(self) -> dict[int, str]:
        """Return the text of each id that has one."""
        if not self._texts:
            texts = {id_: char for char, id_ in self._vocabulary.chars}
            for left, right, result in self._vocabulary.merges:
                texts[result] = texts[left] + texts[right]
            self._texts = texts
        return self._texts

    def _build_model(self) -> Any:
        from tokenizers import models

        texts = self._token_texts()
        keys = {text: id_ for id_, text in texts.items()}
        keys[_UNK_KEY] = self._vocabulary.specials["unk"]
        merges = [(texts[left], texts[right]) for left, right, _ in self._vocabulary.merges]
        return models.BPE(vocab=keys, merges=merges, unk_token=_UNK_KEY, fuse_unk=True)

    def _split(self, text: str) -> Iterable[str]:
        return split_words(text)

    def _model_word(self, word: str) -> str:
        return WORD_START + word

    def unknown(self, text: str) -> list[str]:
        return [char for word in split_words(text) for char in word if char not in self._characters]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, words separated by spaces; unknown characters appear as <UNK>."""
        texts = self._token_texts()
        specials = {self._vocabulary.specials[name]: text for name, text in _SPECIAL_TEXTS.items()}
        pieces = []
        for id_ in ids:
            id_ = int(id_)
            if id_ == PAD_ID or not 0 <= id_ < self.vocab_size:
                continue
            piece = specials[id_] if id_ in specials else texts[id_]
            pieces.append(" " + piece[1:] if piece.startswith(WORD_START) else piece)
        text = "".join(pieces)
        return text[1:] if text.startswith(" ") else text
