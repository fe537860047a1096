"""Dirty data: whatever lies in a folder, training uses what is good, lists the rest once, and stops above a limit."""
from __future__ import annotations

import json
import os
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, as_bytes, bomb, flags, refused, run_script, train_here, write_pairs
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from bpe import load_tokenizer
from data import DataSettings, ImageTextFolder, TextSettings, create_dataset
from data.folder import list_pairs
from data.images import MAX_PIXELS
from utils import loading
from utils.errors import UserError, run_main
from utils.skipped import Entry, SkipReport, start_report

VOCABULARY = str(ROOT / "bpe" / "demo_vocab.txt")
T = 16


def picture(mode="RGB", size=(20, 16), color=None):
    return Image.new(mode, size, (120 if len(mode) == 1 else (200, 30, 60)) if color is None else color)


def jpeg(**options):
    return as_bytes(picture(), "JPEG", **options)


TURNED = Image.Exif()
TURNED[0x0112] = 6
NOISE = Image.frombytes("RGB", (64, 64), random.Random(0).getrandbits(8 * 64 * 64 * 3).to_bytes(64 * 64 * 3, "big"))
FRAMES = [picture("P", color=number) for number in range(3)]

GOOD_IMAGES = {
    "plain.jpg": jpeg(), "cmyk.jpg": as_bytes(picture().convert("CMYK"), "JPEG"), "turned.jpg": jpeg(exif=TURNED),
    "grey.jpg": as_bytes(picture("L"), "JPEG"), "palette.png": as_bytes(picture().convert("P"), "PNG"),
    "palette transparent.png": as_bytes(picture("P", color=0), "PNG", transparency=0),
    "bits.png": as_bytes(Image.new("1", (9, 9)), "PNG"), "1x1.png": as_bytes(picture(size=(1, 1)), "PNG"),
    "16 bit.png": as_bytes(Image.new("I;16", (20, 16), 30000), "PNG"),
    "alpha.png": as_bytes(Image.new("RGBA", (20, 16), (1, 2, 3, 100)), "PNG"),
    "animated.png": as_bytes(picture(), "PNG", save_all=True, append_images=[picture(color=(0, 0, 0))] * 3),
    "animated gif.png": as_bytes(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "broken exif.jpg": jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 24),
    "20000 wide.png": as_bytes(picture("L", (20000, 3)), "PNG"), "png called.jpg": as_bytes(picture(), "PNG"),
    "jpeg called.png": jpeg(), "webp called.bmp": as_bytes(picture(), "WEBP"),
    "cmyk lzw.tif": as_bytes(picture().convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "grey 16 bit.tiff": as_bytes(Image.new("I;16", (20, 16), 30000), "TIFF"), "-rf.jpg": jpeg(),
    "\u202egpj.emoji \U0001f469\U0001f3fd.jpg": jpeg(),
}
NONE = "files that are not images"
BAD_IMAGES = {
    "truncated.jpg": (as_bytes(NOISE, "JPEG")[:700], "damaged images"),
    "also truncated.png": (as_bytes(NOISE, "PNG")[:300], "damaged images"), "zero.jpg": (b"", NONE),
    "html.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", NONE), "zeros.png": (bytes(5000), NONE),
    "cut off.tif": (as_bytes(NOISE, "TIFF", compression="tiff_lzw")[:9000], NONE),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", NONE),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NONE),
    "bomb.png": (bomb(20000, 20000), "images with too many pixels"),
    "larger bomb.png": (bomb(2**31 - 1, 2**31 - 1), "images with too many pixels"),
    "claims more.png": (bomb(3000, 2000), "damaged images"),
}
GOOD_CAPTIONS = {
    "arabic": "قطة تجلس على الكرسي", "hebrew": "חתול יושב על כיסא\u202e",
    "emoji": "\U0001f469\U0001f3fd\u200d\U0001f680 \u2764\ufe0f", "marked": "\ufeffa cat",
    "control": "a\x07 cat\x1b[31m", "many lines": "a cat\n" * 5000, "long line": "cat " * 100000,
    "one long word": "x" * 300000, "windows": "a cat\r\na dog\r\n",
}
BAD_CAPTIONS = {
    "nul": (b"a cat\0 on a mat", "caption files with NUL bytes"),
    "utf-16": ("a cat".encode("utf-16-le"), "caption files with NUL bytes"),
    "latin": (b"caf\xe9", "caption files that are not UTF-8"),
    "binary": (bytes(range(128, 256)), "caption files that are not UTF-8"),
    "megabytes": (b"cat " * (1 << 20), "caption files of more than 1 MiB"),
    "empty": (b" \n\t\n", "empty caption files"),
}
NUM_BAD = len(BAD_IMAGES) + len(BAD_CAPTIONS)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A folder of all that, a pair each."""
    folder = tmp_path_factory.mktemp("dirty")
    for name, content in {**GOOD_IMAGES, **{name: bad for name, (bad, _) in BAD_IMAGES.items()}}.items():
        (folder / name).write_bytes(content)
        (folder / (os.path.splitext(name)[0] + ".txt")).write_text("a red picture\n", encoding="utf-8")
    good = {name: caption.encode() for name, caption in GOOD_CAPTIONS.items()}
    for name, caption in {**good, **{name: bad for name, (bad, _) in BAD_CAPTIONS.items()}}.items():
        (folder / (name + ".jpg")).write_bytes(GOOD_IMAGES["plain.jpg"])
        (folder / (name + ".txt")).write_bytes(caption)
    # Names and things that a careless walk opens, waits for, or follows for ever.
    os.mkfifo(str(folder / "pipe.txt"))
    for name in ("unpaired.jpg", "pipe.jpg"):
        (folder / name).write_bytes(GOOD_IMAGES["plain.jpg"])
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "folder.jpg").mkdir()
    return folder


NUM_GOOD = len(GOOD_IMAGES) + len(GOOD_CAPTIONS)
PIPES = 1  # the pair whose caption is a pipe


def lines(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="ascii").splitlines()]


def dataset_of(folder, **options):
    settings = DataSettings(T, 16, truncate_captions=True, **options)
    return create_dataset(str(folder), load_tokenizer(VOCABULARY), settings)


def test_what_is_good_is_read_and_the_rest_listed_once_with_its_reason(dirty, tmp_path):
    report = tmp_path / "out" / "skipped.jsonl"
    dataset = dataset_of(dirty, max_bad_fraction=1, skipped_file=report)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            for index in range(len(dataset)):
                text, image = dataset[index]
                assert text.shape == (T,) and image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert len(dataset) == NUM_GOOD + len(BAD_IMAGES) and dataset.num_unreadable == len(BAD_IMAGES)
    found = {os.path.relpath(line["path"], str(dirty)): line["reason"] for line in lines(report) if line["bad"]}
    expected = {name: reason for name, (_, reason) in BAD_IMAGES.items()}
    expected.update((name + ".txt", reason) for name, (_, reason) in BAD_CAPTIONS.items())
    assert found == dict(expected, **{"pipe.txt": "caption files that cannot be read"})
    assert len(lines(report)) == len(found) + 2  # and the two images without captions, which are no bad pairs
    assert f"listed in {report}" in dataset.report() and "<" not in report.read_text()  # no Python objects


def test_loader_processes_list_each_file_once(dirty, tmp_path):
    report = tmp_path / "skipped.jsonl"
    dataset = dataset_of(dirty, max_bad_fraction=1, skipped_file=report)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        # So small batches that neighbours are read by different processes at the same time.
        order = [index for index in range(len(dataset)) for _ in range(2)]
        for _ in DataLoader(dataset, batch_sampler=[[index] for index in order], num_workers=2):
            pass
    paths = [line["path"] for line in lines(report)]
    assert len(paths) == len(set(paths)) and sum(line["bad"] for line in lines(report)) == NUM_BAD + PIPES
    assert dataset.skipped.num_bad == NUM_BAD + PIPES


def test_more_than_the_limit_is_one_error_that_names_flag_counts_and_file(dirty, tmp_path):
    report = tmp_path / "skipped.jsonl"
    message = refused("", dataset_of, dirty, skipped_file=report)
    bad = len(BAD_CAPTIONS) + PIPES
    assert f"--input-folder {dirty}" in message and "--max-bad-fraction 0.01" in message
    assert f"{bad} of {NUM_GOOD + NUM_BAD + PIPES} samples" in message and str(report) in message
    assert "2 caption files with NUL bytes (such as " in message and "\n" not in message
    assert sum(line["bad"] for line in lines(report)) == bad


@pytest.mark.parametrize("workers", [0, 2])
def test_images_above_the_limit_end_the_loading_wherever_they_are_read(tmp_path, workers):
    write_pairs(tmp_path, ["a cat"] * 100, size=4)
    for number in (3, 50, 51, 99):
        (tmp_path / f"{number:03}.png").write_bytes(b"no picture")
    report = tmp_path / "out" / "skipped.jsonl"

    def read(limit):
        start_report(report)
        dataset = dataset_of(tmp_path, max_bad_fraction=limit, skipped_file=report)
        return sum(len(text) for text, _ in loading.read(loading.make_loader(dataset, workers, batch_size=4)))

    assert read(0.04) == 100 and len(lines(report)) == 4
    refused("--max-bad-fraction 0.03 allows: 4 files that are not images", read, 0.03)


def test_an_error_of_a_loader_process_is_still_one_line(capsys):
    try:
        raise UserError("--input-folder x: 1 of 1\nsamples")
    except UserError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")  # what PyTorch sends to the main process
    assert refused("", run_main, sent.reraise, kind=SystemExit) == "1"
    assert capsys.readouterr().err == "error: --input-folder x: 1 of 1 samples\n"


def test_deep_folders_are_walked_to_their_end(tmp_path):
    write_pairs(tmp_path, ["a cat"])
    here, depth, limit, frames, frame = os.getcwd(), 150, sys.getrecursionlimit(), 0, sys._getframe()
    while frame:
        frames, frame = frames + 1, frame.f_back
    os.chdir(str(tmp_path))
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        sys.setrecursionlimit(frames + 100)  # a walk that calls itself for each level runs out
        assert len(list_pairs(str(tmp_path)).images) == 1
    finally:
        sys.setrecursionlimit(limit)
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_are_named(tmp_path):
    write_pairs(tmp_path, ["a cat"])
    (tmp_path / "closed").mkdir(mode=0)
    assert [skipped.reason for skipped in list_pairs(str(tmp_path)).skipped] == ["unreadable folders"]


def test_the_limit_on_pixels_comes_before_any_decoding(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs have it
    (write_pairs(tmp_path, ["a cat"]) / "000.png").write_bytes(bomb(MAX_PIXELS // 1000 + 1, 1000))
    dataset = ImageTextFolder(list_pairs(str(tmp_path)), TextSettings(load_tokenizer(VOCABULARY), T), 16)
    refused("", dataset.image, 0, kind=Image.DecompressionBombError)


def test_sources_share_a_file_and_count_apart(tmp_path):
    file = tmp_path / "skipped.jsonl"
    first, second = (SkipReport(file, 0.5, source) for source in ("--input-folder a", "--validation-folder b"))
    assert first.add("x", "damaged") and not first.add("x", "damaged again") and second.add("x", "damaged")
    first.add_unused([Entry("y", "unpaired")])
    assert first.num_bad == second.num_bad == 1 and len(lines(file)) == 3
    again = SkipReport(file, 0.5, "--input-folder a")  # another process
    assert again.num_bad == 1 and not again.add("x", "damaged")
    again.check(2)
    refused("--input-folder a: 1 of 1 samples.* 1 damaged .such as x.", again.check, 1)
    SkipReport(tmp_path / "names.jsonl").add("caf\udce9\n.jpg", "damaged", "line\nbreak " * 100)
    line = lines(tmp_path / "names.jsonl")[0]
    assert line["path"] == "caf\udce9\n.jpg" and len(line["detail"]) == 300


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    report = SkipReport(tmp_path / "file" / "skipped.jsonl", 0.5)
    assert report.add("a", "damaged") and report.add("b", "damaged") and report.num_bad == 2
    assert len(caplog.records) == 1 and "skipped.jsonl" in caplog.text
    report.check(4)
    full = SkipReport("/dev/full", 0.5)
    assert full.add("a", "damaged") and full.num_bad == 1 and "No space left" in caplog.text


def train_flags(folder, dirty, out, cache, limit):
    """Those of test_train, but of dirty data."""
    cache = str(out / "codes") if cache == "on" else "off"
    own = ["--input-folder", str(dirty), "--bpe-path", VOCABULARY, "--truncate-captions", "--text-seq-len", str(T)]
    own += ["--gradient-accumulation", "1", "--validation-fraction", "0.2", "--checkpoint-save-steps", "0"]
    return flags(folder, out, *own, "--max-bad-fraction", str(limit), "--cache-codes", cache)


@pytest.mark.parametrize("cache", ["off", "on"])
def test_training_on_dirty_data_ends_well_and_lists_it(folder, dirty, tmp_path, cache):
    for _ in range(2 if cache == "off" else 1):  # the second run lists it anew, not again
        train_here(train_flags(folder, dirty, tmp_path, cache, 0.5))
        bad = [line for line in lines(tmp_path / "skipped.jsonl") if line["bad"]]
        assert len(bad) == len({line["path"] for line in bad}) == NUM_BAD + PIPES
        assert {line["reason"] for line in bad} >= {reason for _, reason in BAD_IMAGES.values()}
    assert (tmp_path / "ckpt" / "dalle_1.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["off", "on"])
def test_two_processes_stop_at_the_limit_in_one_line_each(folder, dirty, tmp_path, cache):
    limit = (len(BAD_CAPTIONS) + PIPES + 1) / (NUM_GOOD + NUM_BAD + PIPES)  # the captions, and one image
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 train.py".split()
    done = run_script(*command, *train_flags(folder, dirty, tmp_path, cache, limit))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all("--max-bad-fraction" in line and "skipped.jsonl" in line for line in errors)
    paths = [line["path"] for line in lines(tmp_path / "skipped.jsonl")]
    assert len(paths) == len(set(paths))
