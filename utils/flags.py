"""Options that several commands take, each declared once; `utils.options.again` puts one into another table.

parser = Parser(...); parser.add_argument("--num_images", type=whole(1), default=128)
options = parse_flags(parser, argv)
"""
from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, NoReturn, Sequence

from utils.errors import UsageError, nearest
from utils.options import REQUIRED, Options, option


@dataclass(frozen=True)
class PartsOptions(Options, title="model"):
    """Vocabulary and VQGAN: arguments of `dalle.loading.load`."""

    bpe_path: str | None = option(None, "vocabulary of YouTokenToMe, tokenizer.json of Hugging Face, or list of "
                                  "classes", none="the one the model was trained with, where it is found, else CLIP's",
                                  path=True)
    vqgan_model_path: str | None = option(None, "weights of the VQGAN (.ckpt or .safetensors)", path=True,
                                          none="those the model was trained with, where they are found, else the "
                                          "published f16-1024 model, downloaded")
    vqgan_config_path: str | None = option(None, "YAML file of the VQGAN", path=True, none="that of its weights")


@dataclass(frozen=True)
class ModelOptions(PartsOptions, title="model"):
    """Which model to load."""

    dalle_path: str = option(REQUIRED, "checkpoint of the model, folder in minDALL-E's layout or minDALL-E/1.3B; demo: "
                             "the one that comes with this repository", path=True)


@dataclass(frozen=True)
class DeviceOptions(Options, title="device"):
    """Where and how to compute."""

    device: str = option("auto", "where to compute; auto: cuda if there is one, else cpu",
                         choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads; 0: as PyTorch chooses", ge=0)
    matmul_precision: str | None = option(None, "how exactly float32 matrix products take their factors, as "
                                          "torch.set_float32_matmul_precision says: highest (float32), high (TF32 on a "
                                          "GPU, 16 bits on a CPU with AMX), medium (bfloat16)",
                                          none="high on a GPU, highest on a CPU", choices=("highest", "high", "medium"))


@dataclass(frozen=True)
class DataOptions(Options, title="data"):
    """Which images and captions to read."""

    input_folder: str = option(REQUIRED, "folder of images and captions, webdataset shards such as "
                               "'DIR/{00000..00099}.tar', or 'demo' for the built-in set", path=True)
    max_bad_fraction: float = option(0.01, "share of the data that may be skipped because it cannot be read; "
                                     "skipped.jsonl beside the results lists it", ge=0, le=1)
    dataloader_workers: int = option(0, "processes that read data", ge=0, le=1024)


@dataclass(frozen=True)
class CaptionOptions(Options):
    """How a list of captions is read (utils/caption_lists.py)."""

    caption_column: str | None = option(None, "column or JSON key of the caption, or its number in a table without a "
                                        "header", none="the usual names")


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage and exiting, and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**dict({"allow_abbrev": False}, **settings))

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[len("argument ") :] if message.startswith("argument ") else message)

    def known_flags(self) -> list[str]:
        """Every flag, as it is documented."""
        return [text for action in self._actions for text in action.option_strings]


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number from `low` to `high` (None: no limit)."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text[:80]!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {Range(low, high)}, got {text[:80]}")
        return value

    return convert


class Range(NamedTuple):
    """Finite numbers from `low` (with `above`: larger than it) to `high` (None: no limit), and 0 with `or_zero`."""

    low: float
    high: float | None = None
    above: bool = False
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is one of these."""
        if self.or_zero and value == 0:
            return True
        inside = value > self.low if self.above else value >= self.low
        return inside and math.isfinite(value) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        text = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        text += "" if self.high is None else f" and at most {self.high:g}"
        return text + (", or 0" if self.or_zero else "")


def number(*limits: Any, **more: Any) -> Callable[[str], float]:
    """Return an argparse type: a number of `Range(*limits, **more)`."""
    allowed = Range(*limits, **more)

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text[:80]!r}") from None
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text[:80]}")
        return value

    return convert


def share_or_count(text: str) -> float:
    """An argparse type: a share from 0 to below 1, or a whole number."""
    value = number(0)(text)
    if value >= 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"a share below 1 or a whole number, not {value:g}")
    return value


def path(text: str) -> str:
    """An argparse type: a path, `~` expanded; not empty."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a path")
    return os.path.expanduser(text)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model to load and where to compute: arguments of `dalle.loading.load`."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--dalle_path",
        type=path,
        required=True,
        metavar="FILE",
        help="checkpoint of the model; demo: the one that comes with this repository",
    )
    model.add_argument(
        "--bpe_path",
        type=path,
        metavar="FILE",
        help="vocabulary (default: the one the model was trained with, where it is found, else CLIP's)",
    )
    model.add_argument(
        "--vqgan_model_path",
        type=path,
        metavar="FILE",
        help="weights of the VQGAN (default: the one the model was trained with, where it is found, else the published "
        "f16-1024 model, which is downloaded)",
    )
    model.add_argument("--vqgan_config_path", type=path, metavar="FILE", help="YAML file of the VQGAN")
    model.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto (default): cuda if there is one, else cpu",
    )


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv` (default: the process's arguments); flags may be spelled with - or _.

    A value may start with a single dash (`--text -rf`). Raises UsageError for unknown flags, naming the nearest one,
    where `parser.error` does for everything else.
    """
    # argparse has no public list of its flags.
    takes_value = {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}
    known = {flag.replace("-", "_"): flag for flag in takes_value if flag.startswith("--")}
    words = _canonical_words(list(sys.argv[1:] if argv is None else argv), known, takes_value)
    options, rest = parser.parse_known_args(words)
    if rest:
        word = rest[0].partition("=")[0]
        if not word.startswith("-"):
            raise UsageError(
                f"unexpected argument '{word}': put a value of several words in quotes; --help lists the flags"
            )
        hint = nearest(word.replace("-", "_"), known)
        for name, flag in known.items():
            hint = hint.replace(f"'{name}'", f"'{flag}'")
        raise UsageError(f"unknown flag '{word}'.{hint} --help lists the flags")
    return options


def _canonical_words(argv: list[str], known: dict[str, str], takes_value: dict[str, bool]) -> list[str]:
    """Spell known flags as the parser does, and tie values that look like short flags to theirs (`--text=-rf`)."""
    words: list[str] = []
    tie = False  # the word before is a flag that waits for its value
    for word in argv:
        flag, equals, value = word.partition("=")
        flag = known.get(flag.replace("-", "_"), flag) if flag.startswith("--") else flag
        if tie and word.startswith("-") and not word.startswith("--"):
            words[-1] += "=" + word
            tie = False
        elif flag in takes_value:
            words.append(flag + equals + value)
            tie = takes_value[flag] and not equals
        else:
            words.append(word)
            tie = False
    return words
