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
from hypothesis import given, settings, strategies
from PIL import Image, ImageOps

from bpe import load_tokenizer
from data import (
    CodesDataset,
    DataSettings,
    GeneratedDataset,
    ImageTextFolder,
    TextSettings,
    create_dataset,
    create_datasets,
)
from data import datasets as datasets_module
from data.folder import PackedStrings, list_pairs
from data.images import BROKEN_IMAGE_ERRORS, image_to_tensor, load_image, prepare_image, to_rgb
from data.order import _splitmix64_tensor, draw_below, draw_unit, epoch_order, split_holdout, splitmix64
from utils.errors import UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco2017_free256"
T = 12


class Letters:
    """A tokenizer of one id per character, small enough to see through; knows what the data sets ask of one."""

    vocab_size = 300

    def unknown(self, text):
        return []

    def tokenize(self, texts, text_seq_len, truncate=False):
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), text_seq_len, dtype=torch.int64)
        for row, text in zip(rows, texts):
            if len(text) > text_seq_len and not truncate:
                raise UserError(f"caption {text!r} is too long: --truncate-captions")
            ids = [ord(character) % 299 + 1 for character in text[:text_seq_len]]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows


def write_pair(folder, stem, captions="one\ntwo\nthree\n", color=(200, 30, 60), size=(20, 16), suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(str(folder / (stem + suffix)))
    (folder / (stem + ".txt")).write_text(captions, encoding="utf-8")


def folder_dataset(folder, image_size=8, **text):
    text.setdefault("truncate_captions", True)
    return ImageTextFolder(list_pairs(str(folder)), TextSettings(Letters(), T, **text), image_size)


def words(text):
    """The letters of a text made by `Letters`, for ASCII captions."""
    return "".join(chr(number - 1) for number in text.tolist() if number)


# Order and draws -----------------------------------------------------------------------------------------------------


def test_splitmix64_matches_its_published_sequence():
    # First outputs of the reference implementation for seed 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(strategies.lists(strategies.integers(0, 2**64 - 1), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_tensor_and_integer_hashes_are_equal(values):
    signed = [value - 2**64 if value >> 63 else value for value in values]
    hashed = _splitmix64_tensor(torch.tensor(signed, dtype=torch.int64)).tolist()
    assert [value % 2**64 for value in hashed] == [splitmix64(value) for value in values]


def test_epoch_order_is_a_permutation_by_seed_and_epoch():
    order = epoch_order(1000, seed=1, epoch=3)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(1000))
    assert torch.equal(order, epoch_order(1000, seed=1, epoch=3))
    for other in (epoch_order(1000, 1, 4), epoch_order(1000, 2, 3), torch.arange(1000)):
        assert (order == other).sum() < 20
    assert epoch_order(0, 1, 1).tolist() == [] and epoch_order(1, 1, 1).tolist() == [0]
    assert epoch_order(10, seed=42, epoch=0).tolist() == FIRST_ORDER


FIRST_ORDER = [
    7,
    2,
    5,
    1,
    0,
    9,
    8,
    4,
    6,
    3,
]  # written down once: an interrupted run goes on in the same order after an upgrade


def test_split_holdout_is_disjoint_complete_and_fixed_by_seed():
    train, held = split_holdout(1000, 0.05, seed=7)
    assert len(held) == 50 and sorted(train.tolist() + held.tolist()) == list(range(1000))
    assert torch.equal(held, held.sort().values) and torch.equal(held, split_holdout(1000, 50, seed=7)[1])
    assert not torch.equal(held, split_holdout(1000, 50, seed=8)[1])
    assert len(split_holdout(10, 0.01, seed=1)[1]) == 1 and len(split_holdout(10, 0.0, seed=1)[1]) == 0
    for holdout in (10, 11, -1, 1.0, -0.1):
        with pytest.raises(UserError):
            split_holdout(10, holdout, seed=1)


def test_draws_are_even():
    counts = collections.Counter(draw_below(5, "caption", 42, 0, index) for index in range(5000))
    assert set(counts) == set(range(5)) and min(counts.values()) > 850
    assert abs(sum(draw_unit("null", 1, 1, index) for index in range(5000)) / 5000 - 0.5) < 0.02


# Pairing -------------------------------------------------------------------------------------------------------------


def test_pairs_across_folders_by_stem_as_coco_lies(tmp_path):
    for stem in ("000000000009", "000000000025"):
        write_pair(tmp_path / "train2017", stem, suffix=".jpg")
        (tmp_path / "train2017_captions").mkdir(exist_ok=True)
        text = tmp_path / "train2017" / (stem + ".txt")
        text.rename(tmp_path / "train2017_captions" / text.name)
    pairs = list_pairs(str(tmp_path))
    assert [Path(pairs.images[index]).name for index in range(2)] == ["000000000009.jpg", "000000000025.jpg"]
    assert pairs.captions[1] == "one\ntwo\nthree" and pairs.skipped == []


def test_every_way_to_be_no_pair_is_counted(tmp_path):
    write_pair(tmp_path / "a", "good", "  first \n\n second\r\n", suffix=".JPG")
    write_pair(tmp_path / "a", "empty", " \n\n\t\n")
    write_pair(tmp_path / "a", "latin")
    (tmp_path / "a" / "latin.txt").write_bytes("café".encode("latin-1"))
    write_pair(tmp_path / "a", "lonely")
    (tmp_path / "a" / "lonely.txt").unlink()
    (tmp_path / "a" / "words.txt").write_text("no image")
    (tmp_path / "a" / "._good.jpg").write_bytes(b"resource fork")
    write_pair(tmp_path / ".hidden", "unseen")
    write_pair(tmp_path / "photos", "both")
    for labels in ("labels", "captions"):
        (tmp_path / labels).mkdir()
        (tmp_path / labels / "both.txt").write_text("45 0.47 0.68")
    (tmp_path / "photos" / "both.txt").unlink()
    write_pair(tmp_path / "a", "twice")
    write_pair(tmp_path / "thumbnails", "twice")
    (tmp_path / "thumbnails" / "twice.txt").unlink()
    pairs = list_pairs(str(tmp_path))
    stems = [Path(pairs.images[index]).stem for index in range(len(pairs.images))]
    assert stems == ["good", "twice"] and Path(pairs.images[1]).parent.name == "a"
    assert pairs.captions[0] == "first\nsecond"
    assert {skipped.reason: skipped.num_files for skipped in pairs.skipped} == {
        "caption files that are not UTF-8": 1,
        "empty caption files": 1,
        "images with several caption files of their name": 1,
        "images without captions": 1,
        "images whose captions belong to another image of the same name": 1,
        "text files without an image": 1,
    }
    report = pairs.report()
    assert "2 pairs" in report and "1 empty caption files (such as a/empty.txt)" in report and "\n" not in report


def test_each_folder_may_use_the_same_stems(tmp_path):
    write_pair(tmp_path / "a", "1", "from a")
    write_pair(tmp_path / "b", "1", "from b")
    pairs = list_pairs(str(tmp_path))
    assert [pairs.captions[0], pairs.captions[1]] == ["from a", "from b"]


@pytest.mark.parametrize("text_first", [True, False])
def test_parallel_trees_pair_by_the_names_of_their_folders(tmp_path, text_first):
    texts, images = ("a", "b") if text_first else ("b", "a")
    for part in ("train/red", "train/blue", "val/red"):
        write_pair(tmp_path / images / part, "0", part)
        (tmp_path / texts / part).mkdir(parents=True)
        (tmp_path / images / part / "0.txt").rename(tmp_path / texts / part / "0.txt")
    write_pair(tmp_path / images / "train" / "green", "0")
    (tmp_path / images / "train" / "green" / "0.txt").unlink()
    pairs = list_pairs(str(tmp_path))
    for number in range(3):
        assert pairs.images[number] == str(tmp_path / images / pairs.captions[number] / "0.png")
    assert pairs.num_bad == 0 and [skipped.reason for skipped in pairs.skipped] == ["images without captions"]


def test_a_folder_of_the_same_name_decides_only_where_it_is_the_only_one(tmp_path):
    write_pair(tmp_path / "images" / "red", "0")
    for folder in ("labels", "captions"):
        (tmp_path / folder / "red").mkdir(parents=True)
        (tmp_path / folder / "red" / "0.txt").write_text("which?")
    (tmp_path / "images" / "red" / "0.txt").unlink()
    write_pair(tmp_path, "good")
    (skipped,) = list_pairs(str(tmp_path)).skipped
    assert skipped.reason == "images with several caption files of their name"


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.TIFF", "a.jfif", "a.jpe"])
@pytest.mark.parametrize("text", ["a.txt", "a.caption", "a.cap"])
def test_less_common_suffixes_are_read(tmp_path, name, text):
    kind = {"gif": "GIF", "tif": "TIFF", "tiff": "TIFF"}.get(name[2:].lower(), "JPEG")
    Image.new("RGB", (20, 16), (200, 30, 60)).save(str(tmp_path / name), kind)
    (tmp_path / text).write_text("a red picture")
    dataset = folder_dataset(tmp_path)
    _, image = dataset[0]
    assert dataset.captions(0) == ["a red picture"] and (image[:, 4, 4] - torch.tensor([200, 30, 60])).abs().max() < 4


def test_the_usual_type_of_several_has_the_captions(tmp_path):
    for suffix in (".gif", ".jpg", ".tif"):
        write_pair(tmp_path, "1", suffix=suffix)
    (tmp_path / "1.caption").write_text("tags")
    pairs = list_pairs(str(tmp_path))
    assert [pairs.images[0], pairs.captions[0]] == [str(tmp_path / "1.jpg"), "one\ntwo\nthree"] and pairs.num_bad == 0


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
    with pytest.raises(UserError, match=r"2 \*.heic.*data/process_trainset.py --captions"):
        list_pairs(str(tmp_path))


def test_links_are_followed_and_loops_end(tmp_path):
    write_pair(tmp_path / "elsewhere", "1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "photos").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert len(list_pairs(str(root)).images) == 1


@pytest.mark.parametrize("content", [None, "empty", "only images"])
def test_no_pairs_is_an_error_that_names_flag_and_layout(tmp_path, content):
    folder = tmp_path / "data"
    if content:
        folder.mkdir()
    if content == "only images":
        write_pair(folder, "1")
        (folder / "1.txt").unlink()
    with pytest.raises(UserError) as raised:
        list_pairs(str(folder))
    message = str(raised.value)
    assert "--input-folder" in message and str(folder) in message
    if content:
        assert ("1 images" if content == "only images" else "0 images") in message and "one caption per line" in message


@given(strategies.lists(strategies.text("aé漢👩\n \udcff", max_size=8), max_size=8))
@settings(deadline=None, max_examples=30)
def test_packed_strings_give_back_what_they_took(strings):
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert [packed[index] for index in range(len(packed))] == strings
    with pytest.raises(IndexError):
        packed[len(strings)]


# Pixels --------------------------------------------------------------------------------------------------------------


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
    expected = torch.nn.functional.interpolate(
        pixels[None], size=(24, 24), mode="bilinear", antialias=True, align_corners=False
    )[0]
    got = torch.tensor(np.array(prepare_image(source, 24)), dtype=torch.float32).permute(2, 0, 1)
    assert (got - expected).abs().max() <= 1.0


def test_modes_become_rgb():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (4, 4), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("I;16", (4, 4), 0x8000)).getpixel((0, 0)) == (128, 128, 128)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


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


@given(data=strategies.data())
@settings(deadline=None, max_examples=60)
def test_damaged_files_raise_only_what_is_handled(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / ("x" + data.draw(strategies.sampled_from([".jpg", ".png", ".bmp"])))
    gradient = Image.linear_gradient("L").resize((24, 24))
    Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).save(str(path))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(strategies.integers(1, 6))):
        content[data.draw(strategies.integers(0, len(content) - 1))] = data.draw(strategies.integers(0, 255))
    path.write_bytes(content[: data.draw(strategies.integers(0, len(content)))])
    try:
        image = load_image(str(path), 8)
    except BROKEN_IMAGE_ERRORS:
        return
    assert tuple(image.shape) == (3, 8, 8)


# Data sets -----------------------------------------------------------------------------------------------------------


def test_items_are_text_and_image(tmp_path):
    write_pair(tmp_path, "a", "red")
    text, image = folder_dataset(tmp_path)[0]
    assert text.dtype == torch.int64 and tuple(text.shape) == (T,) and words(text) == "red"
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 8, 8)
    assert image[:, 0, 0].tolist() == [200, 30, 60]


def test_captions_depend_on_seed_epoch_and_index_only(tmp_path):
    for number in range(30):
        write_pair(tmp_path, f"{number:02}")
    dataset = folder_dataset(tmp_path, seed=5)
    by_epoch = []
    for epoch in range(20):
        dataset.set_epoch(epoch)
        by_epoch.append([words(dataset[index][0]) for index in range(30)])
    assert {"one", "two", "three"} == {caption for epoch in by_epoch for caption in epoch}
    assert len({tuple(epoch) for epoch in by_epoch}) == 20
    again = folder_dataset(tmp_path, seed=5)
    again.set_epoch(7)
    assert [words(again[index][0]) for index in reversed(range(30))] == by_epoch[7][::-1]
    other = folder_dataset(tmp_path, seed=6)
    other.set_epoch(7)
    assert [words(other[index][0]) for index in range(30)] != by_epoch[7]


def test_subsets_keep_the_captions_of_the_whole_and_have_their_own_epoch(tmp_path):
    for number in range(10):
        write_pair(tmp_path, str(number), f"a{number}\nb{number}\nc{number}")
    dataset = folder_dataset(tmp_path)
    part = dataset.subset(torch.tensor([7, 2, 5])).subset(torch.tensor([2, 0]))
    dataset.set_epoch(3)
    assert words(part[0][0])[1] == "5" and words(part[1][0])[1] == "7" and len(part) == 2
    part.set_epoch(3)
    assert words(part[0][0]) == words(dataset[5][0])
    with pytest.raises(IndexError):
        part[2]


def test_some_captions_are_left_out_for_guidance_but_not_in_validation(tmp_path):
    for number in range(20):
        write_pair(tmp_path, str(number), "word")
    dataset = folder_dataset(tmp_path, null_cond_prob=0.3)
    left_out = 0
    for epoch in range(20):
        dataset.set_epoch(epoch)
        left_out += sum(int((dataset.text_at(index) == 0).all()) for index in range(20))
    assert 90 < left_out < 150
    train, validation = dataset.split(5)
    assert len(train) == 15 and len(validation) == 5
    assert train.settings.null_cond_prob == 0.3
    for epoch in range(20):
        validation.set_epoch(epoch)
        assert all(words(validation[index][0]) == "word" for index in range(5))
    assert dataset.split(0) == (dataset, None)


def test_unreadable_images_are_replaced_the_same_way_every_time_and_counted(tmp_path, caplog):
    for number in range(12):
        write_pair(tmp_path, f"{number:02}", f"n{number:02}", color=(number, 0, 0))
    for broken in ("03", "04"):
        path = tmp_path / (broken + ".png")
        path.write_bytes(path.read_bytes()[:40])
    dataset = folder_dataset(tmp_path)
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


def test_a_replacement_stays_within_the_subset(tmp_path):
    for number in range(10):
        write_pair(tmp_path, str(number), f"n{number}")
    (tmp_path / "4.png").write_bytes(b"no image")
    part = folder_dataset(tmp_path).subset(torch.tensor([4, 8]))
    assert words(part[0][0]) == "n8"


def dataset_of_folder(folder, max_bad_fraction):
    settings = DataSettings(T, 8, truncate_captions=True, max_bad_fraction=max_bad_fraction)
    return create_dataset(str(folder), Letters(), settings)


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    for number in range(3):
        write_pair(tmp_path, str(number))
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="^--input-folder .*: 3 of the 3 images cannot be read, such as .*; mend"):
        dataset_of_folder(tmp_path, 1)[1]


def test_nothing_but_unreadable_images_held_out_is_an_error_that_says_so(tmp_path):
    for number in range(40):
        write_pair(tmp_path, f"{number:02}")
    train, held_out = dataset_of_folder(tmp_path, 0.1).split(2)
    names = [held_out.image_name(pair) for pair in held_out._indices.tolist()]
    for name in names:
        Path(name).write_bytes(b"no image")
    with pytest.raises(UserError) as raised:
        held_out[0]
    said = str(raised.value)
    assert said.startswith(f"--input-folder {tmp_path}: 2 of the 2 images held out for validation cannot be")
    assert any(name in said for name in names) and said.endswith("or hold out more by --validation-fraction")
    assert len([train[index] for index in range(len(train))]) == 38


def test_too_long_captions_are_found_before_training(tmp_path):
    write_pair(tmp_path, "a", "short\nfar too long for twelve ids\n")
    with pytest.raises(UserError, match="far too long.*--truncate-captions"):
        create_dataset(str(tmp_path), Letters(), DataSettings(T, 8))
    dataset = create_dataset(str(tmp_path), Letters(), DataSettings(T, 8, truncate_captions=True))
    assert {words(dataset[0][0]) for epoch in range(20) if dataset.set_epoch(epoch) is None} == {
        "short",
        "far too long",
    }
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
    vocabulary = load_tokenizer(str(Path(__file__).resolve().parents[1] / "bpe" / "demo_vocab.txt"))
    create_dataset(str(tmp_path), vocabulary, DataSettings(9, 8, truncate_captions=truncate))
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert message.startswith(f"--input-folder {tmp_path}: the vocabulary lacks 37.5 % of the characters")


def test_loader_processes_see_the_epoch_and_report_what_they_could_not_read(tmp_path):
    for number in range(8):
        write_pair(tmp_path, str(number), "\n".join(f"c{number}{line}" for line in range(5)))
    (tmp_path / "5.png").write_bytes(b"no image")
    dataset = folder_dataset(tmp_path)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        got = torch.cat([text for text, _ in loader])
        assert torch.equal(got, torch.stack([dataset.text_at(i) if i != 5 else dataset[5][0] for i in range(8)]))
        if epoch == 0:
            first = got
    assert not torch.equal(first, got)
    assert dataset.num_unreadable == 1


def test_a_pickled_copy_for_a_spawned_process_shares_epoch_and_flags(tmp_path):
    """What a spawned loader process does to get its data set, without the seconds that starting one takes."""
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / "a.png").write_bytes(b"no image")
    dataset = folder_dataset(tmp_path)
    # Reading the copy back must happen while the handle of the shared memory is alive, as in Process.start().
    copy = pickle.loads(bytes(ForkingPickler.dumps(dataset)))
    dataset.set_epoch(9)
    assert int(copy._epoch) == 9 and len(copy) == 2
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


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_codes_take_the_place_of_images(tmp_path, kind):
    for number in range(4):
        write_pair(tmp_path, str(number), f"n{number}")
        (tmp_path / f"{number}.png").write_bytes(b"never opened")
    codes = torch.arange(4 * 6, dtype=torch.int32).view(4, 6)
    if kind == "numpy":
        codes = pytest.importorskip("numpy").arange(4 * 6, dtype="uint16").reshape(4, 6)
    dataset = CodesDataset(folder_dataset(tmp_path), codes)
    dataset.set_epoch(2)
    text, row = dataset[3]
    assert (
        words(text) == "n3" and row.dtype == torch.int64 and row.tolist() == list(range(18, 24)) and len(dataset) == 4
    )
    with pytest.raises(UserError, match="3 rows of image codes for 4 pairs"):
        CodesDataset(folder_dataset(tmp_path), codes[:3])


def test_images_that_were_never_encoded_are_refused(tmp_path):
    for number in range(3):
        write_pair(tmp_path, str(number))
    codes = torch.arange(3 * 6).view(3, 6)
    codes[1] = -1
    dataset = CodesDataset(folder_dataset(tmp_path), codes)
    assert dataset[2][1].tolist() == codes[2].tolist()
    with pytest.raises(RuntimeError, match="the image of pair 1 was not among those to be encoded"):
        dataset[1]


def test_create_datasets_from_folders_and_random_data(tmp_path, caplog):
    for number in range(10):
        write_pair(tmp_path / "train", str(number), f"n{number}")
        write_pair(tmp_path / "val", f"v{number}", f"v{number}")
    common = (Letters(), DataSettings(T, 8, null_cond_prob=1.0))
    with caplog.at_level(logging.INFO):
        train, validation = create_datasets(str(tmp_path / "train"), *common, validation_holdout=0.2)
    assert caplog.text.count("10 pairs of image and captions") == 1
    assert (len(train), len(validation)) == (8, 2)
    assert words(train[0][0]) == "" and words(validation[0][0]).startswith("n")
    train, validation = create_datasets(str(tmp_path / "train"), *common, validation_folder=str(tmp_path / "val"))
    assert len(train) == 10 and words(validation[0][0]) == "v0"
    train, validation = create_datasets(None, Letters(), DataSettings(T, 8, num_generated=30), validation_holdout=0)
    assert len(train) == 30 and validation is None
    with pytest.raises(UserError, match="--input-folder"):
        create_dataset(None, *common)


def test_create_datasets_of_the_demo(monkeypatch):
    from data import demo

    records = [demo.DemoRecord(str(number), f"caption {number}", Path(str(number))) for number in range(4)]
    monkeypatch.setattr("data.create.demo_records", lambda split: records[:3] if split == "train" else records[3:])
    monkeypatch.setattr(demo, "load_demo_image", lambda record, size: torch.full((3, size, size), int(record.stem)))
    common = ("demo", Letters(), DataSettings(T, 8))
    train, validation = create_datasets(*common)
    assert len(train) == 3 and len(validation) == 1
    text, image = validation[0]
    assert words(text) == "caption 3" and image.dtype == torch.uint8 and bool((image == 3).all())
    image.zero_()
    assert bool((validation[0][1] == 3).all()), "an item must not be a window into the set"
    assert create_datasets(*common, validation_holdout=0)[1] is None
    assert datasets_module.DemoDataset(records, TextSettings(Letters(), T), 8).report().startswith("demo set: 4 ")


# Real photos ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the photos of ../shared/data/coco2017_free256")
def test_real_photos(tmp_path):
    from data.process_trainset import process_captions

    (tmp_path / "val2017").symlink_to(REAL / "val2017", target_is_directory=True)
    process_captions(REAL / "annotations" / "captions_val2017.json", tmp_path / "val2017_captions")
    dataset = create_dataset(str(tmp_path), Letters(), DataSettings(400, 64))
    assert len(dataset) == 80 and dataset.pairs.skipped == []
    images = torch.stack([dataset[index][1] for index in range(80)])
    assert tuple(images.shape) == (80, 3, 64, 64) and dataset.num_unreadable == 0
    assert len({bytes(image.view(-1).tolist()) for image in images}) == 80
    assert images.float().std() > 40
