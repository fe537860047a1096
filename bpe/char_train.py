"""Learn a character BPE vocabulary, as in minDALL-E: python -m bpe.train --kind char (see train.py).

Equal captions give equal files on every machine: [PAD] 0, [UNK] 1, the characters within and at the end (`</w>`) of
words, the most frequent first, then the merges.
"""
from __future__ import annotations

import collections
import json
from typing import Counter, Iterable

from utils.errors import UserError

from .char_bpe import PAD, UNK, WORD_END, Words
from .train import learn_merges


def learn_char_vocabulary(captions: Iterable[str], vocab_size: int) -> tuple[bytes, bytes]:
    """Return the content of the two files, `*-vocab.json` and `*-merges.txt`, of at most `vocab_size` tokens.

    Raises `UserError` when there are no captions or `vocab_size` is too small for the characters alone.
    """
    splitter = Words()
    words: Counter[tuple[str, ...]] = collections.Counter()
    for caption in captions:
        for word in splitter.of(caption):
            words[(*tuple(word[:-1]), word[-1] + WORD_END)] += 1
    if not words:
        raise UserError("--captions: no captions found")
    counts: Counter[str] = collections.Counter()
    for word, count in words.items():
        for symbol in word:
            counts[symbol] += count
    tokens = [PAD, UNK] + [symbol for symbol, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if vocab_size < len(tokens):
        raise UserError(
            f"--vocab-size {vocab_size} cannot hold the {len(tokens) - 2} characters of these captions (within and "
            f"at the end of words): give at least {len(tokens)}"
        )
    ids: dict[str, int] = {token: index for index, token in enumerate(tokens)}
    ordered = sorted(words.items())  # so that the order of the captions does not matter
    merges = learn_merges(
        [[ids[symbol] for symbol in word] for word, _ in ordered],
        [count for _, count in ordered],
        len(tokens),
        vocab_size - len(tokens),
    )
    pairs = []
    for left, right, _ in merges:
        pairs.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return _files(tokens, pairs)


def _files(tokens: list[str], merges: list[tuple[str, str]]) -> tuple[bytes, bytes]:
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    lines = ["#version: 0.2"] + ["{} {}".format(*merge) for merge in merges]
    return vocabulary.encode("utf-8"), ("\n".join(lines) + "\n").encode("utf-8")
