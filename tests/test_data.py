"""Data sets: pairing of files, pixels, what is skipped or replaced, choices that depend on seed, epoch and index."""
from __future__ import annotations

import collections
import logging
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, Letters, create_dataset, create_datasets, refused, words
from hypothesis import given, settings, strategies
from PIL import Image, ImageOps

from bpe import load_tokenizer
from data import CodesDataset, GeneratedDataset, ImageTextFolder, TextSettings, demo
from data.datasets import DemoDataset
from data.folder import PackedStrings, list_pairs
from data.images import image_to_tensor, load_image, prepare_image, to_rgb
from data.order import epoch_order, random_below, random_bits, random_unit, split_holdout, splitmix64
from data.process_trainset import process_captions
from utils.errors import UserError

T = 12
COMMON = {"tokenizer": Letters(), "text_seq_len": T, "image_size": 8}


def write_pair(folder, stem, captions="one\ntwo\nthree\n", color=(200, 30, 60), suffix=".png"):
    """Write an image and its captions; None: an image without."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), color).save(str(folder / (stem + suffix)))
    if captions is not None:
        (folder / (stem + ".txt")).write_text(captions, encoding="utf-8")


def write_folder(folder, count, captions="n{:02}", broken=()):
    """Write pairs 00, 01, ...; pair n is n red, with the captions of its number. Those in `broken` are no images."""
    for number in range(count):
        write_pair(folder, f"{number:02}", captions.format(number), color=(number, 0, 0))
        if number in broken:
            (folder / f"{number:02}.png").write_bytes(b"no image")
    return folder


def folder_dataset(folder, **text):
    text.setdefault("truncate_captions", True)
    return ImageTextFolder(list_pairs(str(folder)), TextSettings(Letters(), T, **text), 8)


def texts_of(dataset, epoch=0):
    dataset.set_epoch(epoch)
    return [words(dataset.text_at(index)) for index in range(len(dataset))]


def test_hashes_are_the_published_ones_even_and_stay_after_an_upgrade():
    states = [(1234567 + number * 0x9E3779B97F4A7C15) % 2**64 for number in range(3)]
    assert list(map(splitmix64, states)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    counts = collections.Counter(random_below(5, "caption", 42, 0, index) for index in range(5000))
    assert set(counts) == set(range(5)) and min(counts.values()) > 850
    assert abs(sum(random_unit("null", 1, 1, index) for index in range(5000)) / 5000 - 0.5) < 0.02
    order = epoch_order(1000, seed=1, epoch=3)
    others = [epoch_order(1000, seed, epoch) for seed, epoch in ((1, 4), (2, 3), (1 + (1 << 40), 3))]
    for other in (*others, torch.arange(1000)):
        assert (order == other).sum() < 20
    assert epoch_order(10, seed=42, epoch=0).tolist() == [7, 2, 5, 1, 0, 9, 8, 4, 6, 3]  # written down once


@given(strategies.integers(0, 300), strategies.integers(0, 2**64 - 1), strategies.integers(0, 2**20))
@settings(deadline=None, max_examples=30)
def test_an_epoch_visits_each_sample_once_in_the_order_of_its_hash(count, seed, epoch):
    def signed_hash(index):
        number = splitmix64(index ^ random_bits("order", seed, epoch))
        return number - 2**64 if number >> 63 else number

    order = epoch_order(count, seed, epoch)
    assert order.dtype == torch.int64 and order.tolist() == sorted(range(count), key=signed_hash)


def test_split_holdout_is_disjoint_complete_and_fixed_by_seed():
    train, held = split_holdout(1000, 0.05, seed=7)
    assert len(held) == 50 and sorted(train.tolist() + held.tolist()) == list(range(1000))
    assert torch.equal(held, held.sort().values) and torch.equal(held, split_holdout(1000, 50, seed=7)[1])
    assert not torch.equal(held, split_holdout(1000, 50, seed=8)[1])
    assert len(split_holdout(10, 0.01, seed=1)[1]) == 1 and len(split_holdout(10, 0.0, seed=1)[1]) == 0
    for holdout in (10, 11, -1, 1.0, -0.1):
        refused("", split_holdout, 10, holdout, seed=1)


RED, BLUE = b"one\ntwo", b"three"
#: What lies in a folder, which images find which captions, and how many are skipped for which reason.
LAYOUTS = {
    "in two folders, as COCO lies": (
        {"val/09.jpg": b"", "val/25.jpg": b"", "captions/09.txt": RED, "captions/25.txt": BLUE},
        {"val/09.jpg": RED, "val/25.jpg": BLUE}, {},
    ),
    "the same stems in each folder": (
        {"a/1.png": b"", "a/1.txt": RED, "b/1.png": b"", "b/1.txt": BLUE}, {"a/1.png": RED, "b/1.png": BLUE}, {},
    ),
    "the usual type of several": (
        {"1.gif": b"", "1.jpg": b"", "1.tif": b"", "1.txt": RED, "1.caption": b"tags"},
        {"1.jpg": RED}, {"images without captions": 2},
    ),
    "a folder of the same name decides only where it is the only one": (
        {"images/red/0.png": b"", "labels/red/0.txt": b"?", "captions/red/0.txt": b"?", "1.png": b"", "1.txt": RED},
        {"1.png": RED}, {"images with several caption files of their name": 1},
    ),
    "hidden files": (
        {"1.png": b"", "1.txt": RED, "._1.jpg": b"resource fork", ".hidden/2.png": b"", ".hidden/2.txt": RED},
        {"1.png": RED}, {},
    ),
    "every way to be no pair": (
        {
            "a/good.JPG": b"", "a/good.txt": b"  one \n\n two\r\n", "a/empty.png": b"", "a/empty.txt": b" \n\n\t\n",
            "a/latin.png": b"", "a/latin.txt": "café".encode("latin-1"), "a/lonely.png": b"", "a/words.txt": RED,
            "photos/both.png": b"", "labels/both.txt": b"45 0.47 0.68", "captions/both.txt": RED,
            "a/twice.png": b"", "a/twice.txt": BLUE, "thumbnails/twice.png": b"",
        },
        {"a/good.JPG": RED, "a/twice.png": BLUE},
        dict.fromkeys([
            "caption files that are not UTF-8", "empty caption files", "images without captions",
            "images with several caption files of their name", "text files without an image",
            "images whose captions belong to another image of the same name",
        ], 1),
    ),
}
PARTS = {"train/red": RED, "train/blue": BLUE, "val/red": b"four"}
for texts, images in (("a", "b"), ("b", "a")):  # whichever is listed first
    files = {f"{texts}/{part}/0.txt": captions for part, captions in PARTS.items()}
    files.update({f"{images}/{part}/0.png": b"" for part in (*PARTS, "train/green")})
    pairs = {f"{images}/{part}/0.png": captions for part, captions in PARTS.items()}
    LAYOUTS[f"parallel trees, texts in {texts}"] = (files, pairs, {"images without captions": 1})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_find_their_captions(tmp_path, layout):
    files, pairs, skipped = LAYOUTS[layout]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = list_pairs(str(tmp_path))
    assert {found.images[number]: found.captions[number].encode() for number in range(len(found.images))} == {
        str(tmp_path / name): captions for name, captions in pairs.items()
    }
    assert {reason.reason: reason.num_files for reason in found.skipped} == skipped
    report = found.report()
    assert f"{len(pairs)} pairs" in report and "\n" not in report
    assert ("1 empty caption files (such as a/empty.txt)" in report) == ("empty caption files" in skipped)


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.TIFF", "a.jfif", "a.jpe"])
@pytest.mark.parametrize("text", ["a.txt", "a.caption", "a.cap"])
def test_less_common_suffixes_are_read(tmp_path, name, text):
    kind = {"gif": "GIF", "tif": "TIFF", "tiff": "TIFF"}.get(name[2:].lower(), "JPEG")
    Image.new("RGB", (20, 16), (200, 30, 60)).save(str(tmp_path / name), kind)
    (tmp_path / text).write_text("a red picture")
    dataset = folder_dataset(tmp_path)
    ids, image = dataset[0]
    assert (ids.dtype, tuple(ids.shape), words(ids)) == (torch.int64, (T,), "a red picture"[:T])
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 8, 8)
    assert dataset.captions(0) == ["a red picture"] and (image[:, 4, 4] - torch.tensor([200, 30, 60])).abs().max() < 4


def test_files_of_other_types_are_named_where_texts_lack_an_image(tmp_path):
    write_pair(tmp_path, "1")
    (tmp_path / "1.json").write_text("{}")
    assert "json" not in list_pairs(str(tmp_path)).report()
    for name in ("2.heic", "3.HEIC", "2.txt"):
        (tmp_path / name).write_text("x")
    report = list_pairs(str(tmp_path)).report()
    assert "1 text files without an image (such as 2.txt)" in report
    assert report.endswith("; skipped files of types that are not read: 2 *.heic, 1 *.json")
    (tmp_path / "1.png").unlink()
    refused(r"2 \*.heic.*data/process_trainset.py --captions", list_pairs, str(tmp_path))


def test_links_are_followed_and_loops_end(tmp_path):
    write_pair(tmp_path / "elsewhere", "1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "photos").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert len(list_pairs(str(root)).images) == 1


def test_no_pairs_is_an_error_that_names_flag_and_layout(tmp_path):
    folder = tmp_path / "data"
    refused(f"--input-folder {folder}", list_pairs, str(folder))
    folder.mkdir()
    refused(f"--input-folder {folder}.*0 images .*one caption per line", list_pairs, str(folder))
    write_pair(folder, "1", None)
    refused(f"--input-folder {folder}.*1 images .*one caption per line", list_pairs, str(folder))


@given(strategies.lists(strategies.text("aé漢👩\n \udcff", max_size=8), max_size=8))
@settings(deadline=None, max_examples=30)
def test_packed_strings_give_back_what_they_took(strings):
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[index] for index in range(len(packed))] == strings
    refused("", packed.__getitem__, len(strings), kind=IndexError)


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (16, 16)])
def test_image_is_the_centre_square_resized_with_antialiasing(tmp_path, size):
    source = Image.effect_noise(size, 100).convert("RGB")
    source.save(str(tmp_path / "x.bmp"))
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = source.crop((left, top, left + side, top + side))
    expected = square.resize((8, 8), Image.Resampling.BILINEAR, reducing_gap=None)
    image = load_image(str(tmp_path / "x.bmp"), 8)
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 8, 8)
    assert image.permute(1, 2, 0).tolist() == np.asarray(expected).tolist()


def test_the_pipeline_equals_antialiased_bilinear_interpolation():
    """torchvision resizes PIL pictures with Pillow; PyTorch's own antialiased filter is the independent reference."""
    source = Image.effect_noise((64, 64), 80).convert("RGB")
    pixels = torch.tensor(np.array(source), dtype=torch.float32).permute(2, 0, 1)
    how = {"mode": "bilinear", "antialias": True, "align_corners": False}
    expected = torch.nn.functional.interpolate(pixels[None], size=(24, 24), **how)[0]
    got = torch.tensor(np.array(prepare_image(source, 24)), dtype=torch.float32).permute(2, 0, 1)
    assert (got - expected).abs().max() <= 1.0


@pytest.mark.parametrize("mode, color, expected", [
    ("RGBA", (0, 0, 0, 0), (255, 255, 255)), ("CMYK", (0, 0, 0, 0), (255, 255, 255)),  # the first is clear: on white
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("I;16", 0x8000, (128, 128, 128)), ("P", 0, (10, 20, 30)),
    ("P transparent", 0, (255, 255, 255)),
])
def test_modes_become_rgb(mode, color, expected):
    image = Image.new(mode.split()[0], (4, 4), color)
    if image.mode == "P":
        image.putpalette([10, 20, 30] + [0] * 765)
        image.info.update({"transparency": 0} if "transparent" in mode else {})
    assert to_rgb(image).getpixel((0, 0)) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    source = Image.new("RGB", (8, 8), (255, 0, 0))
    source.paste((0, 0, 255), (0, 0, 8, 4))
    source.paste((0, 255, 0), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(str(tmp_path / "turned.png"), exif=exif)
    image = load_image(str(tmp_path / "turned.png"), 8)
    with Image.open(str(tmp_path / "turned.png")) as turned:
        assert torch.equal(image, image_to_tensor(ImageOps.exif_transpose(turned)))
    assert torch.equal(image, image_to_tensor(source)) == (orientation == 1)


def test_captions_depend_on_seed_epoch_and_index_only(tmp_path):
    write_folder(tmp_path, 30, "one\ntwo\nthree")
    dataset = folder_dataset(tmp_path, seed=5)
    by_epoch = [texts_of(dataset, epoch) for epoch in range(20)]
    assert {"one", "two", "three"} == {caption for epoch in by_epoch for caption in epoch}
    assert len({tuple(epoch) for epoch in by_epoch}) == 20
    again = folder_dataset(tmp_path, seed=5)
    again.set_epoch(7)
    assert [words(again[index][0]) for index in reversed(range(30))] == by_epoch[7][::-1]
    assert texts_of(folder_dataset(tmp_path, seed=6), 7) != by_epoch[7]


def test_subsets_keep_the_captions_of_the_whole_and_have_their_own_epoch(tmp_path):
    dataset = folder_dataset(write_folder(tmp_path, 10, "a{0}\nb{0}\nc{0}"))
    part = dataset.subset(torch.tensor([7, 2, 5])).subset(torch.tensor([2, 0]))
    dataset.set_epoch(3)
    assert words(part[0][0])[1] == "5" and words(part[1][0])[1] == "7" and len(part) == 2
    part.set_epoch(3)
    assert words(part[0][0]) == words(dataset[5][0])
    refused("", part.__getitem__, 2, kind=IndexError)


def test_some_captions_are_left_out_for_guidance_but_not_in_validation(tmp_path):
    dataset = folder_dataset(write_folder(tmp_path, 20, "word"), null_cond_prob=0.3)
    assert 90 < sum(texts_of(dataset, epoch).count("") for epoch in range(20)) < 150
    train, validation = dataset.split(5)
    assert len(train) == 15 and len(validation) == 5 and train.settings.null_cond_prob == 0.3
    assert all(texts_of(validation, epoch) == ["word"] * 5 for epoch in range(20))
    assert dataset.split(0) == (dataset, None)


def test_unreadable_images_are_replaced_the_same_way_every_time_and_counted(tmp_path, caplog):
    dataset = folder_dataset(write_folder(tmp_path, 12, broken=(3, 4)))
    with caplog.at_level(logging.WARNING):
        items = [dataset[index] for index in range(12)]
    assert len(caplog.records) == 1 and "03.png" in caplog.text
    for index, (text, image) in enumerate(items):
        number = int(words(text)[1:])
        assert number not in (3, 4) and image[0, 0, 0] == number  # text and image stay a pair
        assert number == index or index in (3, 4)
    assert dataset.num_unreadable == 2 and "replaced 2 unreadable images (such as" in dataset.report()
    fresh = folder_dataset(tmp_path)
    assert torch.equal(fresh[4][0], items[4][0]) and torch.equal(fresh[3][0], items[3][0])
    assert words(fresh.subset(torch.tensor([4, 8]))[0][0]) == "n08"  # a replacement stays within the subset


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    folder = str(write_folder(tmp_path / "a", 3, broken=range(3)))
    dataset = create_dataset(input_folder=folder, max_bad_fraction=1, **COMMON)
    refused("^--input-folder .*: 3 of the 3 images cannot be read, such as .*; fix", dataset.__getitem__, 1)
    dataset = create_dataset(input_folder=str(write_folder(tmp_path / "b", 40)), max_bad_fraction=0.1, **COMMON)
    train, held_out = dataset.split(2)
    names = [held_out.image_name(held_out.pair_at(index)) for index in range(2)]
    for name in names:
        Path(name).write_bytes(b"no image")
    said = refused("", held_out.__getitem__, 0)
    assert said.startswith(f"--input-folder {tmp_path / 'b'}: 2 of the 2 images held out for validation cannot be")
    assert any(name in said for name in names) and said.endswith("or hold out more by --validation-fraction")
    assert len([train[index] for index in range(len(train))]) == 38


def test_too_long_captions_are_found_before_training(tmp_path):
    write_pair(tmp_path, "a", "short\nfar too long for twelve ids\n")
    refused("far too long.*--truncate-captions", create_dataset, input_folder=str(tmp_path), **COMMON)
    dataset = create_dataset(input_folder=str(tmp_path), truncate_captions=True, **COMMON)
    assert {texts_of(dataset, epoch)[0] for epoch in range(20)} == {"short", "far too long"}
    untruncated = folder_dataset(tmp_path, truncate_captions=False)
    with pytest.raises(UserError, match="far too long"):  # and is never taken for an unreadable image
        for epoch in range(20):
            untruncated.set_epoch(epoch)
            untruncated[0]
    assert untruncated.num_unreadable == 0


@pytest.mark.parametrize("truncate", [True, False])
def test_captions_that_the_vocabulary_lacks_are_worth_a_warning(tmp_path, caplog, truncate):
    for number in range(3):
        write_pair(tmp_path, str(number), "\u4e00\u53ea\n\u732b cat" if number else "cats")
    common = dict(COMMON, tokenizer=load_tokenizer(str(ROOT / "bpe" / "demo_vocab.txt")), text_seq_len=9)
    create_dataset(input_folder=str(tmp_path), truncate_captions=truncate, **common)
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert message.startswith(f"--input-folder {tmp_path}: the vocabulary lacks 37.5 % of the characters")


def test_loader_processes_see_the_epoch_and_report_what_they_could_not_read(tmp_path):
    dataset = folder_dataset(write_folder(tmp_path, 8, "\n".join(f"c{{0}}{line}" for line in range(5)), broken=(5,)))
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    loader, found = torch.utils.data.DataLoader(dataset, batch_size=4, **workers), []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found.append(torch.cat([text for text, _ in loader]))
        expected = [dataset.text_at(index) if index != 5 else dataset[5][0] for index in range(8)]
        assert torch.equal(found[-1], torch.stack(expected))
    assert not torch.equal(*found) and dataset.num_unreadable == 1


def test_a_pickled_copy_for_a_spawned_process_shares_epoch_and_flags(tmp_path):
    """What a spawned loader process does to get its data set, without the seconds that starting one takes."""
    dataset = folder_dataset(write_folder(tmp_path, 2, "one\ntwo\nthree", broken=(0,)))
    # Reading the copy back must happen while the handle of the shared memory is alive, as in Process.start().
    copy, seen = pickle.loads(bytes(ForkingPickler.dumps(dataset))), {}
    for epoch in range(9):
        seen[epoch] = texts_of(dataset, epoch)
        assert [words(copy.text_at(index)) for index in range(2)] == seen[epoch]
    assert len(set(map(tuple, seen.values()))) > 1 and len(copy) == 2
    copy[0]
    assert dataset.num_unreadable == 1


def test_generated_data_is_random_but_fixed():
    settings_ = TextSettings(Letters(), T, seed=3)
    dataset = GeneratedDataset(50, settings_, 16)
    text, image = dataset[7]
    assert torch.equal(text, GeneratedDataset(50, settings_, 16)[7][0]) and torch.equal(image, dataset[7][1])
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 16, 16) and image.float().std() > 50
    assert not torch.equal(image, dataset[8][1])
    texts = torch.stack([dataset[index][0] for index in range(50)])
    assert int(texts.max()) < 300 and int(texts.min()) == 0 and bool((texts[:, 0] > 0).all())
    pads = texts == 0
    assert bool((pads[:, 1:] >= pads[:, :-1]).all())  # right-padded


@pytest.mark.parametrize("codes", [torch.arange(24, dtype=torch.int32), np.arange(24, dtype="uint16")])
def test_codes_take_the_place_of_images(tmp_path, codes):
    codes = codes.reshape(4, 6)
    folder = write_folder(tmp_path, 4, broken=range(4))  # never opened
    dataset = CodesDataset(folder_dataset(folder), codes)
    dataset.set_epoch(2)
    text, row = dataset[3]
    assert words(text) == "n03" and row.dtype == torch.int64 and row.tolist() == list(range(18, 24))
    assert len(dataset) == 4
    refused("3 rows of image codes for 4 pairs", CodesDataset, folder_dataset(folder), codes[:3])
    never = torch.tensor(codes.tolist())
    never[1] = -1
    dataset = CodesDataset(folder_dataset(folder), never)
    assert dataset[2][1].tolist() == never[2].tolist()
    refused("the image of pair 1 was not encoded", dataset.__getitem__, 1, kind=RuntimeError)


def test_codes_come_with_those_of_a_similar_image(tmp_path):
    codes = torch.zeros(7, 6, dtype=torch.int64) + 10 * torch.arange(7)[:, None]
    codes[1, :5] = codes[0, :5]  # 0 and 1 are similar, 2 is like both; 3 and 4 are equal, 5 is like none
    codes[2, :2], codes[4], codes[6] = 0, codes[3], -1
    dataset = CodesDataset(folder_dataset(write_folder(tmp_path, 7)).subset(torch.arange(6)), codes)
    dataset.find_similar()
    seen = [set() for _ in range(6)]
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for index, found in enumerate(seen):
            own, other = dataset[index][1]
            assert torch.equal(own, codes[index]) and torch.equal(other, dataset[index][1][1])
            found.add(int(other[5]) // 10)
    assert seen == [{1, 2}, {0, 2}, {0, 1}, {3}, {3}, {5}]


def test_create_datasets(tmp_path, caplog, monkeypatch):
    folder = str(write_folder(tmp_path / "train", 10))
    write_folder(tmp_path / "val", 10, "v{}")
    common = dict(COMMON, null_cond_prob=1.0)
    with caplog.at_level(logging.INFO):
        train, validation = create_datasets(input_folder=folder, validation_holdout=0.2, **common)
    assert caplog.text.count("10 pairs of image and captions") == 1 and (len(train), len(validation)) == (8, 2)
    assert words(train[0][0]) == "" and words(validation[0][0]).startswith("n")
    train, validation = create_datasets(input_folder=folder, validation_folder=str(tmp_path / "val"), **common)
    assert len(train) == 10 and words(validation[0][0]) == "v0"
    train, validation = create_datasets(None, num_generated=30, validation_holdout=0, **COMMON)
    assert len(train) == 30 and validation is None
    refused("--input-folder", create_dataset, None, *common)
    records = [demo.DemoRecord(str(number), f"caption {number}", Path(str(number))) for number in range(4)]
    monkeypatch.setattr("data.create.demo_records", lambda split: records[:3] if split == "train" else records[3:])
    monkeypatch.setattr(demo, "load_demo_image", lambda record, size: torch.full((3, size, size), int(record.stem)))
    train, validation = create_datasets(input_folder="demo", **COMMON)
    assert len(train) == 3 and len(validation) == 1
    text, image = validation[0]
    assert words(text) == "caption 3" and image.dtype == torch.uint8 and bool((image == 3).all())
    image.zero_()
    assert bool((validation[0][1] == 3).all()), "an item must not be a window into the set"
    assert create_datasets(input_folder="demo", validation_holdout=0, **COMMON)[1] is None
    assert DemoDataset(records, TextSettings(Letters(), T), 8).report().startswith("demo set: 4 ")


def test_real_photos(tmp_path, shared_data):
    photos = shared_data / "coco2017_free256"
    (tmp_path / "val2017").symlink_to(photos / "val2017", target_is_directory=True)
    process_captions(photos / "annotations" / "captions_val2017.json", tmp_path / "val2017_captions")
    dataset = create_dataset(input_folder=str(tmp_path), tokenizer=Letters(), text_seq_len=400, image_size=64)
    assert len(dataset) == 80 and dataset.pairs.skipped == []
    images = torch.stack([dataset[index][1] for index in range(80)])
    assert tuple(images.shape) == (80, 3, 64, 64) and dataset.num_unreadable == 0
    assert len({bytes(image.view(-1).tolist()) for image in images}) == 80 and images.float().std() > 40
