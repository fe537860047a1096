"""Webdataset shards: read like any tar file, a data set like a folder, never worse for damage."""
from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import pickle
import random
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler
from unittest import mock

import pytest
import torch
from helpers import (
    Letters,
    as_bytes,
    assert_same,
    create_dataset,
    create_datasets,
    in_threads,
    losses_of,
    random_picture,
    refused,
    teams,
    train_here,
    training_flags,
    weights_of,
    words,
    write_pairs,
    write_vqgan,
)

import args
import engines
from data import CodeCache, TextSettings, epoch_order, shard_index, shards
from data.datasets import ImageTextFolder
from data.folder import list_pairs
from data.images import load_image
from data.order import windowed_order
from data.shards import ImageTextShards, Shards, find_shards, open_shards
from data.tar_members import TarTrouble, tar_members
from data.uncaptioned import Batches, open_images
from models.vqgan import VQGAN
from training.setup import build_parts
from utils.errors import UsageError
from utils.skipped import SkipReport

SIZE, T = 8, 16
COMMON = {"tokenizer": Letters(), "text_seq_len": T, "image_size": SIZE}


def picture(number, form="PNG"):
    """Bytes of a picture like no other."""
    return as_bytes(random_picture(number, SIZE), form)


PICTURE = picture(1)


def write_tar(path, members):
    """Write files in their order, from {name: content} or, where names come twice, (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(str(path), "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1700000000.25
            tar.addfile(entry, io.BytesIO(content))


def write_shards(folder, counts=(7, 1, 6, 6), broken=()):
    """Write shards of pairs numbered through, with captions "p<number>a" to "p<number>c" (odd ones: "p<number>")."""
    first = 0
    for shard, count in enumerate(counts):
        members = []
        for number in range(first, first + count):
            content = picture(number)[:60] if number in broken else picture(number)
            text = f"p{number}a\np{number}b\np{number}c"
            captions = ("json", json.dumps({"caption": f"p{number}"})) if number % 2 else ("txt", text)
            members += [(f"{number:04}.png", content), (f"{number:04}.{captions[0]}", captions[1].encode())]
        write_tar(folder / f"{shard:05}.tar", members)
        first += count
    return folder


def opened(pattern, tmp_path):
    return open_shards(find_shards(str(pattern)), tmp_path / "index")


def dataset_of(pattern, tmp_path, **settings):
    return ImageTextShards(opened(pattern, tmp_path), TextSettings(Letters(), T, **settings), SIZE)


def all_captions(found):
    return [index.captions(image, found.files) for index, image in map(found.pair, range(found.num_pairs))]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Indexes of shards without captions go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def members_by_tarfile(path):
    with tarfile.open(str(path), "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def members_by_us(content, size=None):
    found = tar_members(lambda start, size: content[start : start + size], size or len(content))
    return [tuple(member) for member in found]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, tar_format):
    names = ["a.jpg", "b/c.d.jpg", "x" * 90 + ".jpg", "folder" * 20 + "/" + "y" * 60 + ".png", "empty.txt", "ü é.webp"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".jpg", "f/" * 200 + "g.txt"]
    path = tmp_path / "a.tar"
    with tarfile.open(str(path), "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 0 if "empty" in name else 511 + number
            if tar_format == tarfile.PAX_FORMAT:
                entry.mtime, entry.pax_headers = 1.5, {"comment": "a=b path=no size=3", "SCHILY.xattr.x": "ö"}
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = kind, "a.jpg"
                tar.addfile(other)
    found = members_by_us(path.read_bytes())
    assert found == members_by_tarfile(path) and [name for name, _, _ in found] == names


def test_headers_of_huge_and_hostile_sizes():
    entry = tarfile.TarInfo("a.jpg")
    entry.size = 9 << 30
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = entry.tobuf(tar_format)
        members = tar_members(lambda start, size: header[start : start + size], 10 << 30)  # noqa: B023
        assert next(members).size == 9 << 30
        refused("", next, members, kind=TarTrouble)
    entry.type, entry.size = b"Z", 1 << 87  # no type of ours, and a size beyond any file
    refused("", members_by_us, entry.tobuf(tarfile.GNU_FORMAT), 512, kind=TarTrouble)
    entry.type = b"x"
    long = b"5 a=\n" * 200_000 + bytes(48576)
    for size, content in ((4 << 30, b""), (1 << 20, long), (9999, b"9999 size=" + b"9" * 9988)):
        entry.size = size
        header = entry.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")
        refused("", members_by_us, header, kind=TarTrouble)


def test_pairs_as_img2dataset_writes_them(tmp_path):
    write_tar(tmp_path / "00000.tar", {
        "000000000.jpg": picture(0, "JPEG"),
        "000000000.json": json.dumps({"caption": "two\nlines ", "url": "u", "status": "success"}).encode(),
        "000000000.txt": b"two\nlines ", "000000001.webp": picture(1, "WEBP"), "000000001.json": b'{"caption": null}',
        "000000001.txt": b"first\r\nsecond\n\n", "000000002.PNG": picture(2),
        "000000002.json": b'{"caption": ["x", " ", "y"]}', "000000002.cls": b"7",
    })
    found = opened(tmp_path / "00000.tar", tmp_path)
    assert all_captions(found) == ["two lines", "first\nsecond", "x\ny"] and found.skipped == []
    dataset = dataset_of(tmp_path / "00000.tar", tmp_path)
    assert [dataset[index][1].shape for index in range(3)] == [(3, SIZE, SIZE)] * 3
    assert dataset.image_name(1).endswith("00000.tar/000000001.webp")


def test_what_makes_no_pair_is_counted_and_named(tmp_path, caplog):
    good = [("1.png", picture(1)), ("1.txt", b"good")]
    members = {
        "a": [*good, ("2.png", picture(2)), ("x/3.txt", b"alone"), ("4.png", picture(4)), ("4.txt", b" \n")],
        "b": [("5.png", picture(5)), ("5.json", b"{no json"), ("6.png", picture(6)), ("6.json", b'{"url": "u"}')],
        "c": good + good + [("7.png", picture(7)), ("7.txt", b"\xff\xfe"), ("._1.png", b"mac"), ("8.png", picture(8))],
        "d": [("9.png", picture(9)), ("9.json", b"[" * 100000), ("8.png", picture(8)), ("8.txt", b"t" * (2 << 20))],
    }
    for name, content in members.items():
        write_tar(tmp_path / "s" / (name + ".tar"), content)
    whole = (tmp_path / "s" / "a.tar").read_bytes()
    for name, content in {
        "e": whole[:1000], "f": b"", "g": b"<html>404</html>" * 100, "h": b"\x1f\x8b" + bytes(1000),
        "i": whole.replace(b"x/3.txt", b"x/3.tyt"),
    }.items():
        (tmp_path / "s" / (name + ".tar")).write_bytes(content)
    with caplog.at_level(logging.INFO):
        more = {"index_folder": tmp_path / "index", "max_bad_fraction": 1, "skipped_file": tmp_path / "skipped.jsonl"}
        dataset = create_dataset(input_folder=str(tmp_path / "s" / "{a..j}.tar"), **COMMON, **more)
    assert len(dataset) == 3
    listed = {line["reason"]: line for line in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())}
    assert listed["images without captions"]["number"] == 3 and not listed["images without captions"]["bad"]
    assert listed["empty caption files"]["path"] == "a.tar/4.png" and listed["empty caption files"]["bad"]
    assert dataset.skipped.num_bad == dataset.pairs.num_bad > 0
    report = dataset.report()
    assert caplog.text.count("3 pairs of image and captions in 9 shards") == 1
    for expected in (
        "3 images without captions (such as a.tar/2.png)", "1 captions without an image (such as a.tar/x/3)",
        "1 empty caption files (such as a.tar/4.png)", "2 json files that cannot be read (such as b.tar/5.png)",
        "1 json files without a caption (such as b.tar/6.png)", "1 compressed shards",
        "1 images of a name used before (such as c.tar/1.png)", "1 captions of 1 MB and more (such as d.tar/8.png)",
        "1 caption files that are not UTF-8 (such as c.tar/7.png)", "2 shards that are not tar files (such as f.tar)",
        "1 truncated shards, used up to that point (such as e.tar)",
        "1 damaged shards, used up to that point (such as i.tar)",
        f"1 shards that do not exist (such as {tmp_path / 's' / 'j.tar'})",
    ):
        assert expected in report


CAT, OTHER = b"a cat", b"no"
NAMED = {
    "img and cap": ({}, {"a.img": PICTURE, "a.cap": CAT}), "capitals": ({}, {"a.JPG": PICTURE, "a.TXT": CAT}),
    "jpeg and caption": ({}, {"a.jpeg": PICTURE, "a.caption": CAT}),
    "webp and text": ({}, {"a.webp": PICTURE, "a.text": CAT}), "dots": ({}, {"./d/a.jpg": PICTURE, "d/a.txt": CAT}),
    "key text": ({}, {"a.png": PICTURE, "a.json": b'{"text": "a cat", "url": "u"}'}),
    "key TEXT": ({}, {"a.png": PICTURE, "a.json": b'{"TEXT": "a cat", "caption": " "}'}),
    "txt before such keys": ({}, {"a.png": PICTURE, "a.json": b'{"text": "no", "TEXT": "no"}', "a.txt": CAT}),
    "own key": ({"shard_captions": "top,txt"},
                {"a.png": PICTURE, "a.json": b'{"caption": "no", "top": "a cat"}', "a.cap": OTHER}),
    "own suffixes": ({"shard_images": "picture", "shard_captions": ".words"},
                     {"a.picture": PICTURE, "a.words": CAT, "a.png": OTHER}),
}


@pytest.mark.parametrize("name", NAMED)
def test_members_by_their_usual_names_and_by_flag(tmp_path, name):
    options, members = NAMED[name]
    write_tar(tmp_path / "0.tar", members)
    place = {"input_folder": str(tmp_path / "0.tar"), "index_folder": tmp_path / "index"}
    dataset = create_dataset(**place, **COMMON, **options)
    assert len(dataset) == 1 and dataset.captions(0) == ["a cat"]
    assert torch.equal(dataset[0][1], load_image(io.BytesIO(PICTURE), SIZE))


def test_suffixes_by_flag_for_images_without_captions(tmp_path, own_cache):
    write_tar(tmp_path / "0.tar", [("a.view", picture(1)), ("b.VIEW", picture(2)), ("c.png", picture(3))])
    found = open_images(str(tmp_path / "0.tar"), SIZE, 256, 0, shard_images="view,x")
    assert [len(part) for part in found] == [1, 1]
    expected = [load_image(io.BytesIO(picture(number)), SIZE) for number in (1, 2)]
    images = [part.take(part[[0]])[0] for part in found]
    assert {image.numpy().tobytes() for image in images} == {image.numpy().tobytes() for image in expected}
    complaint = "fewer than two images .*not read: .*view.*; --shard-images names"
    refused(complaint, open_images, str(tmp_path / "0.tar"), SIZE, 256, 0)
    for folder in ("demo", str(tmp_path)[:-1]):
        refused("--shard-images needs webdataset shards", open_images, folder, SIZE, 256, 0, shard_images="view")


def test_other_names_find_an_index_of_their_own(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": PICTURE, "a.txt": b"one", "a.cap": b"two"})
    for captions, expected in (("txt", "one"), ("cap", "two"), (None, "one"), ("cap", "two")):
        members = shard_index.Members.named(None, captions)
        found = open_shards(find_shards(str(tmp_path / "0.tar")), tmp_path / "index", members=members)
        assert all_captions(found) == [expected]


@pytest.mark.parametrize("members, expected", [
    (
        {"a.picture": b"x", "b.picture": b"x", "a.words": b"x"},
        r"not read: 2 \*.picture, 1 \*.words; expected images .*--shard-images",
    ),
    ({"a.png": b"x", "a.json": b'{"top": "a cat", "url": "u"}'}, "json files without a caption: 'top', 'url'; .*txt"),
])
def test_members_of_other_names_are_said(tmp_path, own_cache, members, expected):
    write_tar(tmp_path / "0.tar", members)
    refused(expected, opened, tmp_path / "0.tar", tmp_path)
    if "a.picture" in members:
        complaint = r"fewer than two images in the shards; not read: 2 \*.picture"
        refused(complaint, open_images, str(tmp_path / "0.tar"), SIZE, 2, seed=1)
    write_tar(tmp_path / "1.tar", {**members, "z.png": PICTURE, "z.txt": b"z"})
    found = opened(tmp_path / "1.tar", tmp_path)
    assert ("json files" in found.report()) == (found.num_images > 1) and found.num_pairs == 1


@pytest.mark.parametrize("options", [{"shard_images": "img"}, {"shard_captions": "a,,b"}])
def test_flags_of_shards_are_refused_where_they_cannot_be_heeded(tmp_path, options):
    write_tar(tmp_path / "s" / "0.tar", {"a.img": PICTURE, "a.txt": b"a"})
    write_pairs(tmp_path / "f", ["a"])
    folder = tmp_path / ("s" if "shard_captions" in options else "f")
    refused("--shard-", create_dataset, input_folder=str(folder), **COMMON, **options, kind=UsageError)


@pytest.mark.parametrize("lost", [1, 2])
def test_lost_shards_are_counted_as_shards(tmp_path, own_cache, lost):
    write_shards(tmp_path, (90, 90))
    (tmp_path / "00002.tar").write_bytes(b"no tar" * 200)
    pattern = str(tmp_path / ("{00000..00003}.tar" if lost == 2 else "{00000,00001,00003,00000}.tar"))
    report, complaint = SkipReport(None, 0.01, "--input-folder"), f"{lost} of {2 + lost} shards cannot be used"
    refused("--input-folder.*: " + complaint, open_shards, find_shards(pattern), tmp_path / "index", report)
    refused(complaint, open_images, pattern, SIZE, 2, seed=1, max_bad_fraction=0.01)
    found = open_shards(find_shards(pattern), tmp_path / "index", SkipReport(None, 0.5, "--input-folder"))
    assert found.num_pairs == 180 and found.num_bad == 0 and found.num_lost == lost


def test_a_shard_that_is_cut_off_anywhere_keeps_its_good_part(tmp_path):
    write_shards(tmp_path, (4,))
    content = (tmp_path / "00000.tar").read_bytes()
    ends = [offset + size for name, offset, size in members_by_tarfile(tmp_path / "00000.tar") if "png" not in name]
    captions = ["p0a\np0b\np0c", "p1", "p2a\np2b\np2c", "p3"]
    for length in [*range(0, len(content), 509), *ends, *(end - 1 for end in ends)]:
        (tmp_path / "cut.tar").write_bytes(content[:length])
        found = Shards(find_shards(str(tmp_path / "cut.tar")), tmp_path / "index")
        assert all_captions(found) == captions[: sum(end <= length for end in ends)]
        for number, (index, image) in enumerate(map(found.pair, range(found.num_pairs))):
            assert index.content(image, found.files) == picture(number)


def test_shards_with_any_bytes_changed_are_read_without_an_error(tmp_path):
    write_shards(tmp_path, (3,))
    content = (tmp_path / "00000.tar").read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        changed = bytearray(content)
        for place in chance.choices(range(len(changed)), k=chance.choice([1, 3, 30])):
            changed[place] = chance.randrange(256)
        (tmp_path / "changed.tar").write_bytes(bytes(changed))
        found = Shards(find_shards(str(tmp_path / "changed.tar")), tmp_path / "index")
        assert len(all_captions(found)) <= 3 and all(all_captions(found))


def test_patterns_globs_folders_and_single_shards(tmp_path):
    write_shards(tmp_path / "a", (1, 1, 1))
    write_shards(tmp_path / "b", (1,))
    (tmp_path / "a" / "00000.parquet").write_text("")
    (tmp_path / "a" / "00000_stats.json").write_text("{}")
    every = [str(tmp_path / "a" / f"{number:05}.tar") for number in range(3)]
    for pattern in ("a/{00000..00002}.tar", "a/*.tar", "a/*", "a", "a/{00000,00001,00002}.tar", "a/0000[0-2].tar"):
        assert find_shards(str(tmp_path / pattern)).paths == every
    assert find_shards(every[1]).paths == every[1:2]
    assert find_shards(str(tmp_path / "{a,b}" / "00000.tar")).paths[1].endswith("b/00000.tar")
    listing = find_shards(str(tmp_path / "a" / "{00001..00004}.tar"))
    assert listing.paths == every[1:] and len(listing.missing) == 2
    os.rename(str(tmp_path / "b" / "00000.tar"), str(tmp_path / "b" / "{x}.tar"))  # a name, not a pattern
    assert find_shards(str(tmp_path / "b" / "{x}.tar")).paths == [str(tmp_path / "b" / "{x}.tar")]
    (tmp_path / "a" / "extra.png").write_bytes(picture(1))
    assert find_shards(str(tmp_path / "a")) is None and find_shards(str(tmp_path / "none")) is None
    write_tar(tmp_path / "0.tar", {"1.png": PICTURE, "2.txt": b"alone"})
    complaint = "no pair of image and caption in 1 shard: 1 captions without an image"
    refused(complaint, opened, tmp_path / "0.tar", tmp_path)
    complaint = r"'d/1.tar': put patterns of shards in quotes.*'DIR/\{00000..00099\}.tar'"
    refused(complaint, args.parse, ["--input-folder", "d/0.tar", "d/1.tar"], kind=UsageError)


@pytest.mark.parametrize("pattern, message", [
    ("https://x.org/{000..099}.tar", "only from disks"), ("s3://bucket/0.tar", "only from disks"),
    ("pipe:cat 0.tar", "only from disks"), ("/nowhere/*.tar", "no such .tar file"),
    ("/nowhere/{0..9}.tar", r"no such .tar file \(such as /nowhere/0.tar\)"), ("/nowhere/0.tar", "no such .tar file"),
    ("/nowhere/{0..9.tar", "unbalanced braces|no such"), (__file__, "neither a folder nor a .tar file"),
    ("/nowhere/{0..99999999999}.tar", "more than 1000000 shards"),
])
def test_what_names_no_shards_is_one_clear_line(pattern, message):
    refused("--input-folder .*" + message, find_shards, pattern)


def test_the_index_is_made_once_and_again_for_shards_that_changed(tmp_path, monkeypatch):
    write_shards(tmp_path)
    scanned, scan = [], shard_index.scan
    monkeypatch.setattr(shard_index, "scan", lambda *given: scanned.append(given[2]) or scan(*given))
    first = all_captions(opened(tmp_path, tmp_path))
    assert len(scanned) == 4 and len(first) == 20
    assert all_captions(opened(tmp_path / "*.tar", tmp_path)) == first and len(scanned) == 4
    write_tar(tmp_path / "00001.tar", {"n.png": picture(99), "n.txt": b"new"})
    assert all_captions(opened(tmp_path, tmp_path)) == [*first[:7], "new", *first[8:]] and scanned[4:] == ["00001.tar"]
    files = sorted((tmp_path / "index").glob("*/*"))
    assert [file.name for file in files] == [f"{number:05}.tar.index" for number in range(4)]
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"null\n" + files[2].read_bytes())
    files[3].write_bytes(files[3].read_bytes().replace(b'"pairs": 6', b'"pairs": 6.5'))
    assert all_captions(opened(tmp_path, tmp_path)) == [*first[:7], "new", *first[8:]] and len(scanned) in (8, 9)


def test_an_index_that_cannot_be_written_stays_in_memory(tmp_path, caplog):
    write_shards(tmp_path / "s")
    (tmp_path / "index").write_text("a file, no folder")
    found = opened(tmp_path / "s", tmp_path)
    [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "cannot keep the index of 4 of 4 shards" in line and "(Not a directory): it stays in memory" in line
    again = pickle.loads(pickle.dumps(found))
    assert len(all_captions(again)) == 20 and all_captions(again) == all_captions(found)


def test_a_shard_that_changes_in_use_is_an_error_and_one_that_vanished_is_replaced(tmp_path):
    write_shards(tmp_path, (3, 3))
    dataset = dataset_of(tmp_path, tmp_path)
    write_tar(tmp_path / "00001.tar", {"n.png": picture(99), "n.txt": b"new"})
    dataset[0]
    refused("00001.tar changed while it was in use", dataset.__getitem__, 3)
    (tmp_path / "00001.tar").unlink()
    dataset[3]  # unreadable images are replaced
    assert dataset.num_unreadable == 1


def test_more_shards_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "_MAX_OPEN", 3)
    write_shards(tmp_path, (1,) * 12)
    dataset = dataset_of(tmp_path, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(12), *reversed(range(12))]:
        assert torch.equal(dataset[index][1], dataset_of(tmp_path, tmp_path)[index][1])
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_items_are_those_of_a_folder_with_the_same_files(tmp_path, shared_data):
    """Real photos, and captions with their blanks and line breaks."""
    photos = sorted((shared_data / "coco2017_free256" / "train2017").glob("*.jpg"))
    lines = json.loads((shared_data / "captions_val2017.json").read_text())["annotations"]
    members = []
    for number, photo in enumerate(photos):
        captions = "\n".join(entry["caption"] for entry in lines[5 * number : 5 * number + 5]).encode()
        members += [(photo.name, photo.read_bytes()), (photo.stem + ".txt", captions)]
    (tmp_path / "folder").mkdir()
    for name, content in members:
        (tmp_path / "folder" / name).write_bytes(content)
    write_tar(tmp_path / "s" / "0.tar", members[:20])
    write_tar(tmp_path / "s" / "1.tar", members[20:])
    settings = TextSettings(Letters(), 64, True, 7, 0.1)
    folder = ImageTextFolder(list_pairs(str(tmp_path / "folder")), settings, 32)
    dataset = ImageTextShards(opened(tmp_path / "s", tmp_path), settings, 32)
    assert len(folder) == len(dataset) == 26
    for epoch in range(3):
        folder.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for index in range(26):
            assert all(map(torch.equal, folder[index], dataset[index]))


def test_an_unreadable_image_is_replaced_by_another_of_the_set_and_counted(tmp_path, caplog):
    write_shards(tmp_path, broken=(3, 9))
    dataset = dataset_of(tmp_path, tmp_path, seed=5)
    items = [dataset[index] for index in range(20)]
    assert words(items[3][0])[:3] not in ("p3", "p9a") and dataset.num_unreadable == 2
    assert "00000.tar/0003.png" in caplog.text and "replaced 2 unreadable images" in dataset.report()
    again = dataset_of(tmp_path, tmp_path, seed=5)
    assert all(torch.equal(again[index][1], items[index][1]) for index in range(20))
    # What a spawned process does to get its data set, without the seconds that starting one takes.
    spawned = pickle.loads(bytes(ForkingPickler.dumps(dataset)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=2, multiprocessing_context="fork")
    forked = torch.cat([images for _, images in loader])
    for index, (_, image) in enumerate(items):
        assert torch.equal(image, spawned[index][1]) and torch.equal(image, forked[index])


def test_validation_pairs_are_taken_from_shards_and_from_shards_of_their_own(tmp_path):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", (2, 2))
    common = dict(COMMON, index_folder=tmp_path / "index")
    train_set, validation_set = create_datasets(input_folder=str(tmp_path / "a"), validation_holdout=0.2, **common)
    pairs = [{part.pair_at(index) for index in range(len(part))} for part in (train_set, validation_set)]
    assert len(pairs[0]) == 16 and len(pairs[1]) == 4 and not pairs[0] & pairs[1]
    folders = {"input_folder": "a/*.tar", "validation_folder": "b/{00000..00001}.tar"}
    folders = {option: str(tmp_path / pattern) for option, pattern in folders.items()}
    train_set, validation_set = create_datasets(**folders, **common)
    assert len(train_set) == 20 and len(validation_set) == 4


def test_neighbours_are_visited_at_about_the_same_time():
    runs = torch.arange(10_000) // 50
    order = windowed_order(runs, 8, seed=3, epoch=1)
    assert sorted(order.tolist()) == list(range(10_000))
    assert torch.equal(order, windowed_order(runs, 8, seed=3, epoch=1))
    visited = runs[order]
    for start in range(0, 10_000, 400):  # a window of 8 runs after the other
        assert len(set(visited[start : start + 400].tolist())) == 8
    first = set(visited[:400].tolist())
    assert max(first) - min(first) > 100  # runs from everywhere
    assert len(set(visited[:40].tolist())) == 8  # mixed within the window
    for other in (windowed_order(runs, 8, 3, 2), windowed_order(runs, 8, 4, 1)):
        assert set(runs[other][:400].tolist()) != first
    assert torch.equal(windowed_order(runs, 200, 3, 1), epoch_order(10_000, 3, 1))
    part = torch.tensor([9_000, 3, 5_000, 1])  # a subset, in whatever order
    assert sorted(windowed_order(part // 50, 2, 3, 1).tolist()) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny VQGAN (8x8 pixels to 2x2 codes) and shards with 20 pairs, two pictures of which are broken."""
    folder = tmp_path_factory.mktemp("training")
    write_vqgan(folder, resolution=SIZE)
    write_shards(folder / "shards", broken=(5, 12))
    return folder


def flags(material, out, *more):
    own = ("--validation-fraction", "0.2", "--ff-dropout", "0.1", "--max-bad-fraction", "0.1")
    return training_flags(material, out, *own, *more, source="shards/{00000..00003}.tar", image_size=SIZE)


def trained(material, out, *more):
    """Train in this process; return the losses of all steps and validations, and the weights."""
    with mock.patch.multiple(shards, NEIGHBOURS=3, WINDOW=2):
        train_here(flags(material, out, *more))
    return losses_of(out), weights_of(out)


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """Losses and weights of a run that nothing interrupts and that keeps no codes."""
    return trained(material, tmp_path_factory.mktemp("whole"), "--cache-codes", "off")


def assert_same_training(first, second):
    assert first[0] == second[0] and len(first[0]) == 2 * 4 + 2
    assert_same(first[1], second[1])


def test_training_is_the_same_with_cached_codes_and_then_reads_no_shard(material, whole, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    cache = ("--cache-codes", str(tmp_path / "codes"))
    first = trained(material, tmp_path / "first", *cache)
    assert "encoding" in caplog.text and list((tmp_path / "codes" / "shards").glob("*/*.index"))
    monkeypatch.setattr(VQGAN, "encode", None)  # from now on whoever encodes fails
    # or reads an image, but for the two broken ones
    monkeypatch.setattr(shards, "load_image", mock.Mock(side_effect=OSError("read again")))
    second = trained(material, tmp_path / "second", *cache)
    assert_same_training(whole, first)
    assert_same_training(whole, second)


@pytest.mark.parametrize("workers, steps", [(0, 3), (0, 6), (2, 3)])
def test_a_run_goes_on_at_the_very_next_step(material, whole, tmp_path, workers, steps):
    more = ("--cache-codes", "off", "--dataloader-workers", workers)
    trained(material, tmp_path, *more, "--max-steps", steps, "--checkpoint-save-steps", "1")
    losses, weights = trained(material, tmp_path, *more, "--resume")
    # Stopping at a step also validates there, which is no step.
    assert_same_training(whole, ([event for event in losses if event[0] == "train" or event[1] in (4, 8)], weights))


def test_processes_encode_runs_of_neighbours_each_image_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTextShards, "neighbours", 3)
    write_shards(tmp_path / "s")
    encoded_by = {}

    def run(team):
        def encode(images):
            for image in images:
                encoded_by.setdefault(int(image.long().sum()), []).append(team.rank)
            return torch.zeros(len(images), 4, dtype=torch.int64)

        settings = {"made_with": {}, "image_size": SIZE, "num_codes": 16, "codes_per_image": 4, "encode": encode}
        CodeCache(tmp_path / "codes", team=team, **settings).encoded(dataset_of(tmp_path / "s", tmp_path), None)

    in_threads(*[functools.partial(run, team) for team in teams(2)])
    images = dataset_of(tmp_path / "s", tmp_path)
    ranks = [encoded_by[int(images[index][1].long().sum())] for index in range(20)]
    assert ranks == [[index // 3 % 2] for index in range(20)]


def samples(argv):
    """A line for every sample of two epochs that this process gets to see."""
    config = args.parse(argv)
    engine, train_set = engines.create(config), build_parts(config).train_set
    lines = []
    for epoch in range(2):
        for step, batch in enumerate(engine.loader(train_set, epoch)):
            for row, image in ((row, image) for part in batch for row, image in zip(*part)):
                lines.append(f"{epoch};{step};{row.tolist()};{int(image.sum())}")
    engine.close()
    return lines


def main():
    """What a process of the next test does."""
    print("\n".join(["", *samples(sys.argv[1:])]))


def test_two_processes_share_every_sample_out_once(server, material, tmp_path):
    """Real processes, each with a worker: together they see in each step what one process sees in it."""
    argv = flags(material, tmp_path, "--validation-fraction", "0", "--cache-codes", tmp_path / "codes")
    written = "".join(server.together([*argv, "--dataloader-workers", "1"], tmp_path, script="test_shards"))
    both = [line for line in written.splitlines() if line.count(";") == 3]
    assert sorted(both) == sorted(samples(argv)) and len(both) == 2 * 20
    for epoch in "01":
        assert len({line.split(";")[2] for line in both if line.startswith(epoch)}) >= 18  # two stand in for others


def test_a_vqgan_trains_on_all_images_of_shards(tmp_path, own_cache):
    write_shards(tmp_path / "s", (3, 4, 5), broken=(4,))
    write_tar(tmp_path / "s" / "x.tar", {f"{n}.png": picture(n) for n in range(12, 20)})  # no captions
    train_images, heldout = open_images(str(tmp_path / "s"), SIZE, 2, seed=1)
    assert len(train_images) == 18 and len(heldout) == 2
    with contextlib.closing(Batches(train_images, 6, seed=1, workers=2)) as batches:
        seen = torch.cat([next(batches) for _ in range(3)])
        assert len({bytes(image.numpy().tobytes()) for image in seen}) == len(seen) >= 17
        assert torch.equal(next(Batches(train_images, 6, seed=1, taken=3)), next(batches))


def test_shards_of_webdatasets_own_writer(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset (requirements-dev.txt) is not installed")
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            sample = {"__key__": f"{number:09}", "png": picture(number), "json": {"caption": f"c{number}"}}
            writer.write(dict(sample, txt=f"c{number}"))
    dataset = dataset_of(tmp_path / "{00000..00002}.tar", tmp_path)
    assert [dataset.captions(pair) for pair in range(10)] == [[f"c{number}"] for number in range(10)]
    for number, sample in enumerate(webdataset.WebDataset(str(tmp_path / "{00000..00002}.tar"), shardshuffle=False)):
        index, image = dataset.pairs.pair(number)
        assert index.content(image, dataset.pairs.files) == sample["png"] == picture(number)
