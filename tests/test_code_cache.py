"""The code cache: equal to encoding in every step, and never trusting what changed, broke off or was damaged."""
from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path

import numpy
import poptorch_stand_in
import pytest
import torch
from fork_server import be_ordinary
from helpers import (
    Letters,
    assert_same,
    full_disk,
    give_away,
    in_threads,
    losses_of,
    refused,
    teams,
    train_here,
    training_flags,
    weights_of,
    write_pairs,
    write_vqgan,
)
from PIL import Image

from checkpoints.vqgan import load_vqgan
from data import CodeCache, DemoDataset, ImageTextFolder, TextSettings, code_cache, code_files
from data.demo import DemoRecord
from data.folder import list_pairs
from models.vqgan import VQGAN, VqganConfig, image_codes

SIZE, CODES = 8, 4
RECORD = 8 + 1 + 2 * CODES + 4  # bytes


class Encoder:
    """Codes that depend on every pixel of an image and its place, and a count of the images they were made of."""

    def __init__(self, stop_after=None):
        self.count, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.stop_after is not None and self.count + len(images) > self.stop_after:
            raise KeyboardInterrupt
        self.count += len(images)
        sums = (images.flatten(1).long() * torch.arange(1, 3 * SIZE * SIZE + 1)).sum(dim=1, keepdim=True)
        return (sums // torch.tensor([1, 7, 31, 101])) % 1024


def write_photos(folder, count=20):
    return write_pairs(folder, [f"p{index}a\np{index}b\np{index}c\n" for index in range(count)], SIZE, seed=3)


@pytest.fixture(scope="module")
def all_photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("all") / "photos")


@pytest.fixture
def photos(all_photos, tmp_path):
    """A folder of 20 photos that a test may change."""
    return Path(shutil.copytree(all_photos, tmp_path / "photos"))


def photo_set(folder, **settings):
    return ImageTextFolder(list_pairs(str(folder)), TextSettings(Letters(), 8, **settings), SIZE)


def cache_in(folder, encoder, num_codes=1024, **more):
    more.setdefault("made_with", {"vqgan": "0123"})
    return CodeCache(folder, image_size=SIZE, num_codes=num_codes, codes_per_image=CODES, encode=encoder, **more)


def encoded(photos, folder, encoder=None, **more):
    """The photos as codes, and how many images that took."""
    encoder = encoder or Encoder()
    dataset, _ = cache_in(folder, encoder, **more).encoded(photo_set(photos), None)
    return dataset, encoder.count


def break_image(path):
    path.write_bytes(path.read_bytes()[:60])


def codes_file(folder):
    (path,) = folder.glob("*/*.codes")
    return path


def assert_same_items(codes, images):
    """Both data sets give the same texts, and the codes of the images."""
    assert len(codes) == len(images)
    for epoch in range(3):
        codes.set_epoch(epoch)
        images.set_epoch(epoch)
        for index in range(len(images)):
            (text, row), (own_text, image) = codes[index], images[index]
            assert torch.equal(text, own_text)
            assert row.dtype == torch.int64 and torch.equal(row, Encoder()(image[None])[0])


def encoded_rightly(photos, folder):
    """How many images it takes to encode the photos, whose codes are checked."""
    dataset, count = encoded(photos, folder)
    assert_same_items(dataset, photo_set(photos))
    return count


@pytest.mark.parametrize("flip", ["none", "flip", "views"])
@pytest.mark.parametrize("broken", [(), (3, 4, 11)])
def test_items_are_those_of_the_images(photos, tmp_path, broken, flip):
    for index in broken:
        break_image(photos / f"{index:03}.png")
    sets = []
    for _ in range(2):
        images = photo_set(photos, seed=5, null_cond_prob=0.2)
        images.augment = flip
        sets += images.split(6)
    for again in (False, True):
        encoder = Encoder()
        train_set, validation_set = cache_in(tmp_path / "codes", encoder).encoded(sets[0], sets[1])
        assert (encoder.count == 0) == again
        assert_same_items(train_set, sets[2])
        assert_same_items(validation_set, sets[3])


def test_mirrored_images_are_others_in_each_epoch(all_photos):
    plain, mirrored = photo_set(all_photos), photo_set(all_photos)
    mirrored.augment, changes = "flip", []
    for epoch in range(2):
        mirrored.set_epoch(epoch)
        flips = [not torch.equal(plain[index][1], mirrored[index][1]) for index in range(20)]
        assert all(torch.equal(mirrored[i][1], plain[i][1].flip(-1)) for i in range(20) if flips[i])
        assert 3 < sum(flips) < 17
        changes.append(flips)
    assert changes[0] != changes[1] and mirrored.split(4)[1].augment == "none"


@pytest.mark.parametrize("num_codes, size", [(65536, 2), (65537, 4)])
def test_codes_take_two_bytes_where_the_codebook_allows(all_photos, tmp_path, num_codes, size):
    def largest(images):
        return torch.full((len(images), CODES), num_codes - 1)

    dataset, _ = cache_in(tmp_path, largest, num_codes).encoded(photo_set(all_photos), None)
    assert dataset[7][1].tolist() == [num_codes - 1] * CODES
    assert codes_file(tmp_path).stat().st_size == 20 * (8 + 1 + CODES * size + 4)
    rows = pickle.dumps(dataset.codes)  # for a spawned process:
    assert len(rows) < 20 * 200  # the names of the files, not what is in them
    copied = pickle.loads(rows)
    assert all(numpy.array_equal(copied[row], dataset.codes[row]) for row in range(20))


def test_only_what_a_short_run_uses_is_encoded(photos, tmp_path):
    break_image(photos / "002.png")
    used = torch.tensor([7, 2, 0])
    encoder = Encoder()
    dataset, _ = cache_in(tmp_path, encoder).encoded(photo_set(photos), None, used)
    assert encoder.count == 3  # 7, 0 and what stands in for 2
    images = photo_set(photos)
    for index in used.tolist():
        text, image = images[index]
        assert torch.equal(dataset[index][0], text) and torch.equal(dataset[index][1], Encoder()(image[None])[0])
    left_out = [index for index in range(20) if dataset.codes.where[index] < 0]
    assert len(left_out) >= 16
    refused("was not encoded", dataset.__getitem__, left_out[0], kind=RuntimeError)
    assert encoded(photos, tmp_path)[1] == 16


def test_an_image_that_changed_is_encoded_again_and_no_other(photos, tmp_path):
    assert encoded(photos, tmp_path)[1] == 20 and encoded(f"{photos}/", tmp_path)[1] == 0
    os.utime(photos / "001.png", (1e9, 1e9))
    assert encoded(photos, tmp_path)[1] == 1
    for name in ("002.png", "003.png"):
        Image.new("RGB", (9, 9), (1, 2, 3)).save(photos / name)
    assert encoded_rightly(photos, tmp_path) == 2
    (photos / "004.png").unlink()
    write_photos(photos, 1)
    (photos / "000a.png").write_bytes((photos / "005.png").read_bytes())
    (photos / "000a.txt").write_text("new")
    assert encoded_rightly(photos, tmp_path) == 2


def test_another_vqgan_size_or_rule_for_pixels_encodes_all(all_photos, tmp_path, monkeypatch):
    assert encoded(all_photos, tmp_path)[1] == 20
    assert encoded(all_photos, tmp_path, made_with={"vqgan": "4567"})[1] == 20
    monkeypatch.setattr(code_cache, "PIXEL_RULES", "other")
    assert encoded(all_photos, tmp_path)[1] == 20 and len(list(tmp_path.glob("photos-*"))) == 3
    monkeypatch.undo()
    assert encoded(all_photos, tmp_path)[1] == 0
    records = [DemoRecord(path.stem, "c", path) for path in sorted(all_photos.glob("*.png"))]
    encoder = Encoder()
    for part, expected in ((records[:12], 12), (records[12:], 20), (records, 20)):
        dataset, _ = cache_in(tmp_path, encoder).encoded(DemoDataset(part, TextSettings(Letters(), 8), SIZE), None)
        assert encoder.count == expected and len(dataset) == len(part)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff{"])
def test_records_without_their_manifest_are_not_trusted(all_photos, tmp_path, content, caplog):
    encoded(all_photos, tmp_path)
    (manifest,) = tmp_path.glob("*/manifest.json")
    right = manifest.read_bytes()
    manifest.unlink() if content is None else manifest.write_bytes(content)
    assert encoded(all_photos, tmp_path)[1] == 20 and "rebuilding it" in caplog.text and manifest.read_bytes() == right
    assert codes_file(tmp_path).parent == manifest.parent


@pytest.mark.parametrize("seed", range(4))
def test_damaged_records_and_those_cut_off_are_encoded_again(all_photos, tmp_path, seed, caplog):
    chance = random.Random(seed)
    damaged, cut = tmp_path / "damaged", tmp_path / "cut"
    for folder in (damaged, cut):
        encoded(all_photos, folder)
    content = bytearray(codes_file(damaged).read_bytes())
    hit = range(seed % 2, 20, 2)
    for record in hit:  # in all four runs together, each byte of a record once
        content[record * RECORD + (record + seed // 2) % RECORD] ^= 1 << chance.randrange(8)
    codes_file(damaged).write_bytes(content)
    assert encoded_rightly(all_photos, damaged) == len(hit) and "damaged" in caplog.text
    caplog.clear()
    assert encoded(all_photos, damaged)[1] == 0 and "damaged records" not in caplog.text
    length = chance.randrange(20 * RECORD)
    os.truncate(codes_file(cut), length)
    assert encoded_rightly(all_photos, cut) == 20 - length // RECORD


def test_mending_a_file_does_not_disturb_who_reads_it(all_photos, tmp_path):
    reader, _ = encoded(all_photos, tmp_path)
    expected = [reader[index][1].clone() for index in range(20)]
    path = codes_file(tmp_path)
    with open(path, "r+b") as file:
        file.write(b"\1" * 30)  # the first two records
    encoded(all_photos, tmp_path)
    assert not path.exists() and all(torch.equal(reader[index][1], expected[index]) for index in range(3, 20))


@pytest.mark.parametrize("stop_after", [0, 1, 5, 8, 13, 18])
def test_an_interrupted_run_goes_on_where_it_stopped(photos, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(code_cache, "_BATCH", 3)  # images at a time
    break_image(photos / "000.png")
    refused("", encoded, photos, tmp_path, Encoder(stop_after), kind=KeyboardInterrupt)
    written = sum(path.stat().st_size for path in tmp_path.glob("*/*.codes")) // RECORD
    done = max(written - 1, 0)  # without the unreadable image, which comes first
    assert stop_after - 3 < done <= stop_after and encoded_rightly(photos, tmp_path) == 19 - done


def test_an_unreadable_image_is_tried_again_by_the_next_run(photos, tmp_path, caplog):
    path = photos / "006.png"
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    os.utime(path, (1e9, 1e9))
    assert encoded(photos, tmp_path)[1] == 19 and f"cannot read {path}" in caplog.text
    assert encoded(photos, tmp_path)[1] == 0
    path.write_bytes(good)
    os.utime(path, (1e9, 1e9))
    assert encoded_rightly(photos, tmp_path) == 1


def encoded_by_two(photos, folders, encoders=(None, None)):
    """Two processes encode at the same time; returns the data set of each."""
    works = zip(folders, encoders, teams(2))
    runs = [lambda f=folder, e=encoder, t=team: encoded(photos, f, e, team=t)[0] for folder, encoder, team in works]
    return in_threads(*runs)


def test_two_processes_share_the_work(photos, tmp_path, monkeypatch, caplog):
    break_image(photos / "001.png")
    encoders = Encoder(), Encoder()
    for dataset in encoded_by_two(photos, [tmp_path] * 2, encoders):
        assert_same_items(dataset, photo_set(photos))
    assert (encoders[0].count, encoders[1].count) == (10, 9) and len(list(tmp_path.glob("*/*.codes"))) == 2
    # Processes that do not see each other's files train without.
    monkeypatch.setattr(code_cache, "_VISIBILITY_TIMEOUT", 0.1)
    results = encoded_by_two(photos, [tmp_path / "0", tmp_path / "1"])
    assert all(isinstance(result, ImageTextFolder) for result in results) and "share this folder" in caplog.text


def test_a_failure_in_one_process_ends_the_cache_in_all(all_photos, tmp_path, monkeypatch, caplog):
    writing, write = [], code_files.Writer.write

    def fail(writer, records):
        writing.append(threading.current_thread())
        full_disk() if writing[0] is threading.current_thread() else write(writer, records)

    monkeypatch.setattr(code_files.Writer, "write", fail)
    assert all(isinstance(result, ImageTextFolder) for result in encoded_by_two(all_photos, [tmp_path] * 2))
    assert caplog.text.count("No space left on device") == 2


def test_a_second_run_waits_and_takes_what_the_first_one_made(all_photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    begun, told = threading.Event(), f"waiting for process {os.getpid()}"

    class Slow(Encoder):
        def __call__(self, images):
            begun.set()
            deadline = time.monotonic() + 60
            while told not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            return super().__call__(images)

    def second():
        assert begun.wait(60)
        return encoded(all_photos, tmp_path)

    first, (dataset, count) = in_threads(lambda: encoded(all_photos, tmp_path, Slow()), second)
    assert (first[1], count) == (20, 0) and told in caplog.text
    assert_same_items(dataset, photo_set(all_photos))


def test_the_lock_of_a_killed_process_is_free(all_photos, tmp_path):
    place = cache_in(tmp_path, Encoder()).place(photo_set(all_photos))
    ready, child_says = os.pipe()
    child = os.fork()
    if child == 0:
        lock = place.lock()
        os.write(child_says, b"y" if lock else b"n")
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"y" and place.lock() is None and place.lock_holder().startswith(f"process {child} on")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = place.lock()
    assert lock is not None
    lock.close()


def test_a_full_disk_ends_the_cache_not_the_run(tmp_path, caplog):
    """A real short write: files may not grow beyond 1000 bytes, which is in the middle of a record."""
    photos = write_photos(tmp_path / "photos", 60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        dataset, _ = encoded(photos, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(dataset, ImageTextFolder)
    assert "training continues without" in caplog.text and "--cache-codes DIR" in caplog.text
    assert codes_file(tmp_path).stat().st_size == 1000  # the last record is cut off
    assert encoded_rightly(photos, tmp_path) == 60 - 1000 // RECORD


@contextlib.contextmanager
def opened_again(*folders):
    """Folders whose rights a test takes away can be deleted after it."""
    try:
        yield
    finally:
        for folder in filter(Path.is_dir, folders):
            folder.chmod(0o700)


def without_rights_of_root(function):
    """Call it in a fork that may write only what its user may."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            be_ordinary()
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def relink(path, target):
    target.write_text("kept")
    path.unlink()
    path.symlink_to(target)


# What is wrong with the folder of all codes (codes), of a data set (place) or its files, and how to make it so.
UNUSABLE = {
    "above unreadable": lambda codes, place: codes.parent.chmod(0), "unreadable": lambda codes, place: codes.chmod(0),
    "of another user": lambda codes, place: (codes.chmod(0o700), give_away(codes)),
    "a file": lambda codes, place: (shutil.rmtree(codes), codes.write_text("")),
    "below a file": lambda codes, place: (shutil.rmtree(codes.parent), codes.parent.write_text("")),
    "a loop": lambda codes, place: (shutil.rmtree(codes), codes.symlink_to(codes)),
    "empty and unwritable": lambda codes, place: (shutil.rmtree(place), codes.chmod(0o500)),
    "place unreadable": lambda codes, place: place.chmod(0),
    "place without a list": lambda codes, place: place.chmod(0o300),
    "manifest unreadable": lambda codes, place: (place / "manifest.json").chmod(0),
    "codes unreadable": lambda codes, place: codes_file(codes).chmod(0),
    "manifest of another user": lambda codes, place: (
        (place / "manifest.json").chmod(0o700), give_away(place / "manifest.json"),
    ),
    "lock a link": lambda codes, place: (codes_file(codes).unlink(), relink(place / "lock", codes / "kept")),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_cache_that_cannot_be_used_costs_one_warning(all_photos, tmp_path, caplog, what):
    codes = tmp_path / "cache" / "codes"
    encoded(all_photos, codes)
    (place,) = codes.iterdir()
    UNUSABLE[what](codes, place)
    before = contents(tmp_path / "cache")
    caplog.clear()

    def check():
        dataset, _ = encoded(all_photos, codes)
        assert isinstance(dataset, ImageTextFolder)
        [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"cannot keep image codes in {codes} (" in record.message, record.message

    with opened_again(codes.parent, codes, place):
        without_rights_of_root(check)
        assert contents(tmp_path / "cache") == before


def contents(folder):
    """What every file below holds, as far as this user may see it."""
    found = {}
    for root, folders, files in os.walk(str(folder)):
        for name in (*folders, *files):
            found[os.path.join(root, name)] = None
            with contextlib.suppress(OSError):
                found[os.path.join(root, name)] = Path(root, name).read_bytes()
    return found


def test_a_complete_cache_need_not_be_writable(all_photos, tmp_path, caplog):
    encoded(all_photos, tmp_path / "codes")
    (place,) = (tmp_path / "codes").iterdir()
    for path in (*place.iterdir(), place, tmp_path / "codes"):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def check():
        dataset, count = encoded(all_photos, tmp_path / "codes")
        assert count == 0 and not [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert_same_items(dataset, photo_set(all_photos))

    with opened_again(place):
        without_rights_of_root(check)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny VQGAN (8x8 pixels to 2x2 codes) and 20 pictures, two of them broken."""
    folder = tmp_path_factory.mktemp("training")
    write_vqgan(folder, resolution=SIZE)
    photos = write_photos(folder / "pairs")
    break_image(photos / "005.png")
    break_image(photos / "012.png")
    return folder


def flags(material, out, *more):
    own = () if "--generated-data" in more else ("--validation-fraction", "0.2", "--max-bad-fraction", "0.1")
    return training_flags(material, out, "--ff-dropout", "0.1", *own, *more, image_size=SIZE)


def trained(material, out, *more):
    """Train in this process and return the losses of all steps and validations."""
    train_here(flags(material, out, *more))
    return losses_of(out)


SHORT = ("--max-steps", "2", "--validation-fraction", "0")


@pytest.fixture(scope="module")
def short_without(material, tmp_path_factory):
    """Losses of a short run that keeps no codes."""
    return trained(material, tmp_path_factory.mktemp("short"), "--cache-codes", "off", *SHORT)


@pytest.mark.parametrize("more", [(), ("--augment", "flip", "--precision", "bf16")], ids=["plain", "mirrored"])
def test_training_is_the_same_with_and_without(material, tmp_path, more, monkeypatch):
    """Also with a VQGAN whose codes depend on how many images it gets at once, far more than a real one's do."""
    encode = VQGAN.encode
    monkeypatch.setattr(VQGAN, "encode", lambda self, x: (encode(self, x) + 5 * len(x)) % self.num_codes)
    cache = ("--cache-codes", str(tmp_path / "codes"))
    without = trained(material, tmp_path / "without", "--cache-codes", "off", *more)
    first = trained(material, tmp_path / "first", *cache, *more)
    monkeypatch.setattr(VQGAN, "encode", None)  # from now on whoever encodes fails
    assert without == first == trained(material, tmp_path / "second", *cache, *more) and len(without) == 2 * 4 + 2
    for name in ("first", "second"):
        assert_same(weights_of(tmp_path / "without"), weights_of(tmp_path / name))


def test_a_short_run_encodes_only_its_own_images_or_none(material, short_without, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    cache = ("--cache-codes", str(tmp_path / "codes"))
    assert trained(material, tmp_path / "first", *cache, *SHORT) == short_without
    assert "encoding 8 of 8 images" in caplog.text
    trained(material, tmp_path / "similar", *cache, *SHORT, "--code-noise-similar", "0.5")
    assert "encoding 12 of 20 images" in caplog.text  # a run that goes on finds the same ones
    shutil.rmtree(tmp_path / "codes")
    monkeypatch.setattr(code_files.Writer, "write", full_disk)
    assert trained(material, tmp_path / "second", *cache, *SHORT) == short_without
    (warning,) = [record.message for record in caplog.records if "cannot keep image codes" in record.message]
    assert "No space left on device" in warning


def test_random_images_are_encoded_in_the_step_unless_a_folder_is_given(material, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    more = ("--generated-data", "--max-steps", "1")
    without = trained(material, tmp_path / "auto", *more)
    assert "encoding" not in caplog.text
    assert trained(material, tmp_path / "given", "--cache-codes", str(tmp_path / "codes"), *more) == without
    assert "encoding 4 of 4 images" in caplog.text


def test_codes_depend_neither_on_the_batch_nor_on_the_precision_of_products(material, products):
    vqgan = load_vqgan(material / "vqgan.safetensors", material / "vqgan.yaml")
    images = torch.randint(0, 256, (7, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = []
    vqgan.quantize.codes = lambda z: features.append(copy.deepcopy(z)) or torch.zeros(len(z), 4, dtype=torch.int64)
    for part in (slice(7), slice(2, 5), slice(4, 5)):
        image_codes(vqgan, images[part])
    assert [len(z) for z in features] == [1] * 11 and torch.equal(torch.cat(features[2:5]), torch.cat(features[7:10]))
    assert torch.equal(features[4], features[10])
    # They are kept for later runs, which may ask for another one.
    torch.manual_seed(0)
    sizes = {"resolution": 32, "ch": 64, "ch_mult": (1, 2), "attn_resolutions": (16,), "num_res_blocks": 1}
    vqgan = VQGAN(VqganConfig(**sizes, z_channels=64, embed_dim=64, num_codes=1024))
    images, codes = torch.rand(1, 3, 32, 32), []
    for precision in ("highest", "high", "medium"):
        products(precision)
        codes.append(image_codes(vqgan.eval(), images))
        assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_ipus_get_codes_and_no_vqgan(material, tmp_path, monkeypatch):
    poptorch_stand_in.install(monkeypatch)
    words = "--device ipu --batch-size 1 --gradient-accumulation 7 --num-hidden-layers 3 --ipus-per-replica 4 "
    words += "--layers-per-ipu 0 1 1 1 --lr-scheduler ReduceLROnPlateau --ff-dropout 0 --epochs 1 --cache-codes"
    for name, cache in (("off", "off"), ("cached", tmp_path / "codes")):
        engine = train_here(flags(material, tmp_path / name, *words.split(), cache))
        engine.close()
        assert (engine.model.vqgan is None) == (name == "cached")
    both = zip(losses_of(tmp_path / "cached"), losses_of(tmp_path / "off"))
    for (*what, loss, _), (*expected_what, expected, _) in both:
        assert what == expected_what and loss == pytest.approx(expected, abs=1e-5)


def test_two_processes_train_as_one_does_without(server, material, tmp_path):
    without = trained(material, tmp_path / "one", "--cache-codes", "off", "--ff-dropout", "0")
    more = ("--cache-codes", str(tmp_path / "codes"), "--ff-dropout", "0")
    written, _ = server.together(flags(material, tmp_path / "two", *more), tmp_path)
    assert "encoding 16 of 16 images" in written and "encoding 16/16 (100%) images" in written
    assert len(list((tmp_path / "codes").glob("*/*.codes"))) == 4  # of each process, for training and validation
    for (_, _, loss, _), (_, _, expected, _) in zip(losses_of(tmp_path / "two"), without):
        assert loss == pytest.approx(expected, rel=1e-4)
