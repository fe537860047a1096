"""Learn a vocabulary from captions and write it in the YouTokenToMe format.

    python -m bpe.train --captions captions_train2017.json --vocab-size 8192 --output bpe/my_vocab.txt
    python -m bpe.train --captions PAIRS --vocab-size 16384 --kind char --output FOLDER     # as in minDALL-E

Captions come from lists (COCO's and other JSON, JSON lines, tables: utils/caption_lists.py), folders of text files
(.txt, .caption, searched recursively) and single text files with one caption per line. The ids 0-3 are pad, unknown,
begin and end; the word start U+2581 is 4, then come the characters, the most frequent first, then the merges. Equal
captions give equal files on every machine.
"""
from __future__ import annotations

import collections
import heapq
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Counter, Iterable, Iterator, Sequence, Tuple

from tqdm import tqdm

from utils.caption_lists import find_list, read_text
from utils.errors import UsageError, UserError, run_main
from utils.files import TEXT_SUFFIXES, atomic_write, check_writable, make_folder, sha256_file
from utils.flags import CaptionOptions
from utils.options import REQUIRED, Command, option

from .yttm import WORD_START, YttmVocabulary, format_vocabulary, split_words

logger = logging.getLogger(__name__)

SPECIALS = {"unk": 1, "pad": 0, "bos": 2, "eos": 3}

Pair = Tuple[int, int]


def read_captions(paths: Sequence[str], caption_column: str | None = None) -> Iterator[str]:
    """Yield the captions of lists (see utils/caption_lists.py), folders and text files.

    caption_column: column or JSON key of captions in lists. Raises `UserError` for other files, and at the end if there
    was no caption.
    """
    found, problems = False, Problems()
    for caption in _read_each(paths, caption_column, problems):
        found = found or bool(caption.strip())
        yield caption
    shown = ", ".join(paths)[:200]
    if not found:
        why = f": {problems.first}" if problems.count else ""
        raise UserError(f"--captions {shown}: no captions found{why}")
    if problems.count:
        logger.warning("--captions %s: %d entries have no caption: %s", shown, problems.count, problems.first)


class Problems:
    """Counts list entries without a caption."""

    count, first = 0, ""

    def add(self, text: str) -> None:
        self.count += 1
        self.first = self.first or text


def _read_each(paths: Sequence[str], caption_column: str | None, problems: Problems) -> Iterator[str]:
    for name in paths:
        files = [Path(name)]
        if files[0].is_dir():
            files = sorted(f for f in files[0].rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
            if not files:
                raise UserError(f"--captions {name}: no .txt file in this folder")
            if caption_column is not None:
                raise UsageError(f"--caption-column is for lists of captions; --captions {name} is a folder")
        progress = tqdm(
            files, desc="Reading captions", unit=" files", disable=None if len(files) > 1 else True, leave=False
        )
        for file in progress:
            text = read_text(file)
            found = find_list(file, text, None, caption_column, with_images=False)
            if found is None:
                yield from text.split("\n")
                continue
            for row in found.rows:
                if row.problem:
                    problems.add(f"{row.name} {row.problem}")
                yield from row.captions


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs. A space before a period is removed, as in prepared captions."""
    words: Counter[str] = collections.Counter()
    for caption in captions:
        words.update(split_words(" ".join(caption.split()).replace(" .", ".")))
    return words


def choose_alphabet(words: Counter[str], coverage: float) -> list[str]:
    """Return the most frequent characters, in order: as few as cover a fraction `coverage` (0-1] of the text."""
    counts: Counter[str] = collections.Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    needed = coverage * sum(counts.values())
    alphabet: list[str] = []
    covered = 0
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= needed:
            break
        alphabet.append(char)
        covered += count
    return alphabet


def _segments(words: Counter[str], ids: dict[str, int]) -> tuple[list[list[int]], list[int]]:
    """Return the ids of each run of known characters in the words, and how often it occurs.

    An unknown character separates runs, because encoding does not merge across it.
    """
    runs: Counter[tuple[int, ...]] = collections.Counter()
    for word, count in words.items():
        current: list[int] = [ids[WORD_START]]
        for char in word:
            if char in ids:
                current.append(ids[char])
            else:
                runs[tuple(current)] += count
                current = []
        runs[tuple(current)] += count
    # Sorted, so that the order of the captions does not matter.
    ordered = sorted((run, count) for run, count in runs.items() if len(run) > 1)
    return [list(run) for run, _ in ordered], [count for _, count in ordered]


def _pairs(tokens: list[int]) -> Iterator[Pair]:
    """Yield the adjacent pairs that can merge at the same time: "aaa" has "aa" once."""
    last_overlaps = False
    for left, right, before in zip(tokens, tokens[1:], [-1, *tokens]):
        last_overlaps = left == right == before and not last_overlaps
        if not last_overlaps:
            yield left, right


def _merged(tokens: list[int], pair: Pair, result: int) -> list[int]:
    """Return `tokens` with each occurrence of `pair`, from the left, replaced by `result`."""
    merged = []
    position = 0
    while position < len(tokens):
        if position + 1 < len(tokens) and (tokens[position], tokens[position + 1]) == pair:
            merged.append(result)
            position += 2
        else:
            merged.append(tokens[position])
            position += 1
    return merged


def learn_merges(
    tokens: list[list[int]], counts: list[int], first_id: int, num_merges: int
) -> list[tuple[int, int, int]]:
    """Return up to `num_merges` merges (left, right, result), each of the currently most frequent pair.

    `tokens` holds the ids of each word and is modified in place; `counts` how often each word occurs. Results are
    numbered from `first_id`. Of equally frequent pairs, the one of older tokens goes first. There are fewer merges if
    every word becomes one token.
    """
    totals: dict[Pair, int] = collections.defaultdict(int)
    places: dict[Pair, set[int]] = collections.defaultdict(set)
    for word, word_tokens in enumerate(tokens):
        for pair in _pairs(word_tokens):
            totals[pair] += counts[word]
            places[pair].add(word)

    def entry(pair: Pair) -> tuple[int, int, Pair]:
        return -totals[pair], max(pair), pair

    queue = [entry(pair) for pair in totals]
    heapq.heapify(queue)
    merges: list[tuple[int, int, int]] = []
    progress = tqdm(total=num_merges, desc="Learning merges", unit=" merges", disable=None, leave=False)
    while queue and len(merges) < num_merges:
        negative_total, _, pair = heapq.heappop(queue)
        if -negative_total != totals.get(pair, 0):
            continue  # a stale entry; the current count has its own
        result = first_id + len(merges)
        merges.append((pair[0], pair[1], result))
        progress.update()
        changed: set[Pair] = set()
        for word in places[pair]:
            before = tokens[word]
            after = _merged(before, pair, result)
            if len(after) == len(before):
                continue  # other merges have split the pair here
            for old in _pairs(before):
                totals[old] -= counts[word]
                changed.add(old)
            for new in _pairs(after):
                totals[new] += counts[word]
                places[new].add(word)
                changed.add(new)
            tokens[word] = after
        del totals[pair], places[pair]
        changed.discard(pair)
        for other in changed:
            if totals[other] > 0:
                heapq.heappush(queue, entry(other))
            else:
                del totals[other], places[other]
    progress.close()
    return merges


def learn_vocabulary(captions: Iterable[str], vocab_size: int, coverage: float = 1.0) -> YttmVocabulary:
    """Learn a vocabulary of `vocab_size` ids, or fewer, with a warning, if the captions do not have as many tokens.

    `coverage` in (0, 1] is the fraction of all characters that the vocabulary covers; rarer ones become <UNK>.
    Raises `UserError` when there are no captions or `vocab_size` is too small for the characters alone.
    """
    words = count_words(captions)
    if not words:
        raise UserError("--captions: no captions found")
    alphabet = [WORD_START, *choose_alphabet(words, coverage)]
    first_char_id = len(SPECIALS)
    ids = {char: first_char_id + place for place, char in enumerate(alphabet)}
    first_merge_id = first_char_id + len(alphabet)
    logger.info("%d words, %d of them different; %d characters", sum(words.values()), len(words), len(alphabet))
    if vocab_size < first_merge_id:
        raise UserError(
            f"--vocab-size {vocab_size} cannot hold the {len(alphabet)} characters of these captions: give at least "
            f"{first_merge_id} or lower --coverage"
        )
    tokens, counts = _segments(words, ids)
    merges = learn_merges(tokens, counts, first_merge_id, vocab_size - first_merge_id)
    vocabulary = YttmVocabulary(list(ids.items()), merges, dict(SPECIALS))
    if vocabulary.size < vocab_size:
        logger.warning(
            "These captions have only %d different tokens, so the vocabulary has %d instead of --vocab-size %d",
            vocabulary.size,
            vocabulary.size,
            vocab_size,
        )
    return vocabulary


@dataclass(frozen=True)
class VocabularyOptions(CaptionOptions):
    """The flags of this command."""

    captions: tuple[str, ...] = option(REQUIRED, "lists of captions (COCO's and other JSON, JSON lines, CSV, TSV), "
                                       "folders of .txt files, or text files with one caption per line", path=True)
    vocab_size: int = option(REQUIRED, "number of ids (8192 for L16)", ge=1)
    output: str = option(REQUIRED, "where to write the vocabulary", path=True)
    coverage: float = option(1.0, "fraction of all characters to cover; rarer ones become <UNK> (--kind yttm)",
                             gt=0, le=1)
    kind: str = option("yttm", "yttm: YouTokenToMe, a file; char: character BPE as in minDALL-E, a folder",
                       choices=("yttm", "char"))

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if Path(self.output).is_dir() and self.kind == "yttm":
            raise UsageError(f"--output {self.output} is a folder; give the path of a file")
        if os.path.realpath(self.output) in map(os.path.realpath, self.captions):
            raise UsageError(f"--output {self.output} is one of --captions, which it would replace; give another path")
        if self.coverage != 1 and self.kind == "char":
            raise UsageError("--coverage is for --kind yttm, not for --kind char")


COMMAND = Command("python -m bpe.train", "Learn a vocabulary from captions.", VocabularyOptions)


def _write_char_vocabulary(options: VocabularyOptions) -> None:
    from .char_bpe import write_files
    from .char_train import learn_char_vocabulary  # imports this module

    captions = read_captions(options.captions, options.caption_column)
    vocabulary, merges = learn_char_vocabulary(captions, options.vocab_size)
    try:
        write_files(options.output, vocabulary, merges)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written ({error})") from error
    logger.info("Wrote %s: %d ids", options.output, len(json.loads(vocabulary)))


def main() -> None:
    """Learn and write a vocabulary."""
    options = COMMAND.parse()
    if options.kind == "yttm":
        check_writable("--output", options.output)
    else:
        make_folder("--output", options.output)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.kind == "char":
        return _write_char_vocabulary(options)
    captions = read_captions(options.captions, options.caption_column)
    vocabulary = learn_vocabulary(captions, options.vocab_size, options.coverage)
    try:
        with atomic_write(options.output) as file:
            file.write(format_vocabulary(vocabulary))
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written ({error})") from error
    logger.info("Wrote %s: %d ids, sha256 %s", options.output, vocabulary.size, sha256_file(options.output))


if __name__ == "__main__":
    run_main(main)
