"""COCO's caption JSON to text files: the clean-up rules, repetition, every wrong file, and the three commands."""
from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SHARED_DATA, refused, run_script

from bpe.train import read_captions
from data.process_trainset import clean_caption, main, process_captions
from utils.errors import UsageError

COCO = SHARED_DATA / "captions_val2017.json"


def annotation(image_id, caption, **others):
    return {"image_id": image_id, "caption": caption, **others}


def write_json(path, annotations, images=None):
    content = {"info": {"year": 2017}, "licenses": [{"id": 1}], "annotations": annotations}
    if images is not None:
        content["images"] = [{"id": number, "file_name": name} for number, name in images.items()]
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def skipped_in(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("caption, expected", [
    ("A cat .", "A cat."), (" A  cat\n\n sits \t. ", "A cat sits."),
    ("one\r\ntwo\u2028three\u00a0four", "one two three four"), ("A cat . A dog .", "A cat. A dog."), ("\n \t", ""),
    ("3 .5 apples", "3.5 apples"), ("half \ud83d of a pair", "half ? of a pair"),
])
def test_clean_caption(caption, expected):
    assert clean_caption(caption) == expected


def test_one_file_per_image_named_as_the_image(tmp_path):
    images = {9: "000000000009.jpg", 25: "train/odd name.jpg", 3: "c.jpg"}
    annotations = [
        annotation(9, "First .", id=1), annotation(25, "Tüte 漢", id=2), annotation(9, " \n ", id=3),
        annotation(9, "Second\nline", id=4), annotation(9, "First .", id=5), annotation(9, "Second\nline", id=4),
        annotation(77, "of an image that is not listed", id=6),
    ]
    out = tmp_path / "out"
    counts = process_captions(write_json(tmp_path / "c.json", annotations, images), out, max_bad_fraction=0.5)
    assert names_in(out) == ["000000000009.txt", "odd name.txt", "skipped.jsonl"]
    assert (out / "000000000009.txt").read_bytes() == b"First.\nSecond line\nFirst.\n"
    assert (out / "odd name.txt").read_text(encoding="utf-8") == "Tüte 漢\n"
    assert (counts.images, counts.captions, counts.written) == (2, 4, 2)
    assert (counts.empty, counts.repeated, counts.unknown, counts.without) == (1, 1, 1, 1)
    text = str(counts)
    assert "4 captions of 2 images; 2 text files written, 0 unchanged" in text
    assert "1 empty captions" in text and "1 captions of unlisted images" in text
    assert [(line["path"], line["reason"]) for line in skipped_in(out)] == [
        ("annotation 2", "entries with an empty caption"), ("annotation 5", "annotations with a duplicate id"),
        ("annotation 6", "annotations of unlisted images"),
    ]


def test_names_come_from_ids_or_images_and_cannot_lead_out_of_the_folder(tmp_path):
    annotations = [annotation(9, "a"), annotation("named", "b"), annotation("../../up", "c")]
    process_captions(write_json(tmp_path / "c.json", annotations), tmp_path / "deep" / "out")
    assert names_in(tmp_path / "deep" / "out") == ["000000000009.txt", "named.txt", "up.txt"]
    assert names_in(tmp_path) == ["c.json", "deep"]
    images = {1: "../../../evil.jpg", 2: "..\\evil2.jpg", 3: ".."}
    source = write_json(tmp_path / "c.json", [annotation(number, "x") for number in images], images)
    process_captions(source, tmp_path / "a" / "b")
    assert names_in(tmp_path / "a" / "b") == ["000000000003.txt", "evil.txt", "evil2.txt"]
    assert len(list(tmp_path.rglob("*.txt"))) == 3 + 3


def test_a_second_run_writes_only_what_changed(tmp_path):
    source = write_json(tmp_path / "c.json", [annotation(number, "caption") for number in range(4)])
    out = tmp_path / "out"
    assert process_captions(source, out).written == 4
    (out / "000000000001.txt").write_text("half a cap")
    (out / "000000000002.txt").unlink()
    (out / "unrelated.txt").write_text("kept")
    for path in out.iterdir():
        os.utime(str(path), (1, 1))
    assert process_captions(source, out).written == 2
    assert (out / "000000000001.txt").read_text() == "caption\n" and (out / "unrelated.txt").read_text() == "kept"
    assert (out / "000000000000.txt").stat().st_mtime == 1
    assert not [name for name in names_in(out) if name.startswith(".")]


TWO = '{"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}], "images": %s}'
WRONG = {
    "": "truncated", '{"annotations": [{"image_id": 1, "caption": "a': "truncated",
    '{"annotations": [{"image_id": 1,': "truncated", "<html>not found</html>": "not a JSON file",
    "[1, 2]": "no list 'annotations'", '{"images": []}': "no list 'annotations'", "[" * 100000: "nested too deeply",
    '{"annotations": {"image_id": 1}}': "no list 'annotations'", '{"annotations": []}': "no captions found",
    '{"annotations": [{"image_id": 1, "caption": ""}]}': "no captions found", TWO % "3": "'images' must be a list",
    'image,caption\n1.jpg,"A cat\n2.jpg,A dog\n': "row 2 opens a quote",
    TWO % '[{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": "a/1.png"}]': "same name 'a/1'",
}


@pytest.mark.parametrize("content", sorted(WRONG), ids=range(len(WRONG)))
def test_wrong_files_end_in_one_line_that_names_the_file(tmp_path, content):
    source = tmp_path / "captions.json"
    source.write_text(content)
    message = refused("", process_captions, source, tmp_path / "out", max_bad_fraction=1)
    assert WRONG[content] in message and f"--captions {source}" in message and "\n" not in message
    assert not (tmp_path / "out").exists() or names_in(tmp_path / "out") == ["skipped.jsonl"]


BAD_ENTRIES = {
    '{"image_id": 1, "caption": " "}': "an empty caption", "7": "has no 'image_id'",
    '{"caption": "b"}': "names no image", '{"image_id": 1.5, "caption": "a"}': "neither an integer nor text: 1.5",
    '{"image_id": true, "caption": "a"}': "neither an integer nor text: True",
    '{"image_id": -1, "caption": "a"}': "neither an integer nor text: -1",
    '{"image_id": %s, "caption": "a"}' % ("9" * 10000): "neither an integer nor text: 1e+18",
    '{"image_id": 1, "bbox": [1, 2]}': "not instances_",
    '{"image_id": 1, "caption": ["a"]}': "'caption' that is not text",
    '{"image_id": 1, "caption": %s}' % ("[" * 500 + "]" * 500): "'caption' that is not text",
    '{"image_id": 1, "caption": "a", "id": [1]}': "has an 'id'",
    '{"image_id": 1, "caption": "a", "id": 5}, {"image_id": 1, "caption": "b", "id": 5}': "with a duplicate id",
    '{"image_id": "..", "caption": "a"}': "gives no file name",
}


@pytest.mark.parametrize("entry", sorted(BAD_ENTRIES), ids=range(len(BAD_ENTRIES)))
def test_bad_entries_are_left_out_listed_and_limited(tmp_path, entry):
    good = ", ".join('{"image_id": 1, "caption": "good"}' for _ in range(19))
    source, out = tmp_path / "captions.json", tmp_path / "out"
    source.write_text(f'{{"annotations": [{entry}, {good}]}}')
    counts = process_captions(source, out, max_bad_fraction=0.05)
    # The first of two with the same id is a good one.
    assert "good" in (out / "000000000001.txt").read_text() and counts.captions - entry.count("5}, ") == 19
    (line,) = skipped_in(out)
    assert BAD_ENTRIES[entry] in line["reason"] + line["detail"]
    (out / "000000000001.txt").unlink()
    message = refused("--max-bad-fraction 0.04", process_captions, source, out, max_bad_fraction=0.04)
    assert str(out / "skipped.jsonl") in message and "\n" not in message and names_in(out) == ["skipped.jsonl"]


@pytest.mark.parametrize("image, detail", [
    ('{"id": 2}', "lacks a valid"), ('{"id": 1, "file_name": "other.jpg"}', "is of the file '1', too"),
    ('{"id": "x", "file_name": ".."}', "gives no file name"),
])
def test_bad_images_are_left_out_and_listed(tmp_path, image, detail):
    images = f'[{{"id": 1, "file_name": "1.jpg"}}, {image}]'
    (tmp_path / "c.json").write_text(f'{{"images": {images}, "annotations": [{{"image_id": 1, "caption": "a"}}]}}')
    assert process_captions(tmp_path / "c.json", tmp_path / "out", max_bad_fraction=0.5).wrong == 1
    assert detail in skipped_in(tmp_path / "out")[0]["detail"]


SENTENCES = [{"raw": "A cat .", "tokens": ["a", "cat"]}, {"raw": "A dog"}]
LISTS = {
    "Karpathy": json.dumps(
        {"dataset": "coco", "images": [{"filepath": "val2014", "filename": "1.jpg", "sentences": SENTENCES}]}
    ),
    "JSON": '[{"image": "1.jpg", "caption": "A cat .", "image_id": 7}, {"image": "1.jpg", "caption": "A dog"}]',
    "JSON within": '{"info": [{"x": 1}], "data": [{"img_path": "a/1.jpg", "Text": ["A cat .", "A dog"]}]}',
    "JSON with other annotations": '[{"image": "1.jpg", "caption": ["A cat .", "A dog"], "annotations": [{"x": 1}]}]',
    "JSON of names": '{"a/1.jpg": ["A cat .", "A dog"]}',
    "JSON lines": '{"file_name": "1.jpg", "text": "A cat ."}\n\n{"file_name": "1.jpg", "text": "A dog"}\n',
    "JSON lines with others": '{"image": "1.jpg", "caption": "A cat .", "annotations": []}\n'
    '{"image": "1.jpg", "caption": "A dog", "annotations": []}\n',
    "one JSON line": '{"file_name": "1.jpg", "text": ["A cat .", "A dog"]}\n',
    "Flickr8k": 'image,caption\n1.jpg,A cat .\n1.jpg,"A dog"\n',
    "Flickr8k tokens": "1.jpg#0\tA cat .\r\n1.jpg#1\tA dog\r\n",
    "Flickr30k": "image_name| comment_number| comment\n1.jpg| 0| A cat .\n1.jpg| 1| A dog\n",
    "Flickr30k of Hugging Face": 'raw,filename,split\n"[""A cat ."", ""A dog""]",1.jpg,train\n',
    "CSV with an index": ",filepath,title,caption\n0,a/1.jpg,x,A cat .\n1,a/1.jpg,y,A dog\n",
    "CSV without a header": "1.jpg,A cat .\n1.jpg,A dog\n", "TSV": 'path\ttext\n\n1.jpg\t"A cat ."\n1.jpg\tA dog\n',
    "semicolons": "\ufeffimage;caption\n1.jpg;A cat .\n1.jpg;A dog\n",
}
NAMED = {
    "columns": ("who;what\n1.jpg;A cat .\n1.jpg;A dog\n", "who", "what"),
    "numbers": ("A cat .\thttp://x/1.jpg\nA dog\thttp://x/1.jpg\n", "2", "1"),
    "keys": ('[{"name": "1.jpg", "alt": ["A cat .", "A dog"], "caption": "no"}]', "name", "alt"),
    "keys of lines": ('{"id": "1.jpg", "top": "A cat ."}\n{"id": "1.jpg", "top": "A dog"}', "id", "top"),
    "keys in COCO": ('{"annotations": [{"image_id": 1, "alt": ["A cat .", "A dog"]}]}', "image_id", "alt"),
}


@pytest.mark.parametrize("suffix", ["txt", "json", "csv"])
@pytest.mark.parametrize("name", [*LISTS, *NAMED])
def test_lists_are_told_by_what_is_in_them(tmp_path, name, suffix):
    content, image, caption = NAMED[name] if name in NAMED else (LISTS[name], None, None)
    source = tmp_path / ("list." + suffix)
    source.write_bytes(content.encode())
    flags = ["--captions", str(source), "--out-dir", str(tmp_path / "out")]
    main(flags + (["--image-column", image, "--caption-column", caption] if name in NAMED else []))
    (written,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written.read_text() == "A cat.\nA dog\n" and written.name in ("1.txt", "000000000001.txt")
    assert sorted(read_captions([str(source)], caption)) == ["A cat .", "A dog"]


@pytest.mark.parametrize("content, expected", [
    ("image,caption\n1.jpg,A cat, red\n", {"1": "A cat, red"}),  # a comma without quotes
    ('image,caption\n1.jpg,"A cat,\nred ""x"""\n', {"1": 'A cat, red "x"'}),
    ('1.jpg#0\t"A" cat says "B"\n', {"1": '"A" cat says "B"'}),
    ('image,caption\n1.jpg,"[""half a list"\n', {"1": '["half a list'}),
    ('image\tcaption\n1.jpg\t"a ""cat"""\n2.jpg\t"half\n', {"1": 'a "cat"', "2": '"half'}),
    ('{"images": [{"filepath": "a", "filename": "1.jpg", "sentences": [{"raw": "one"}]}, '
     '{"filepath": "b", "filename": "1.jpg", "sentences": [{"raw": "two"}]}]}', {"a/1": "one", "b/1": "two"}),
    ("image,caption\na/1.jpg,one\nb\\1.jpg,two\n../../c/2.jpg,three\n", {"a/1": "one", "b/1": "two", "c/2": "three"}),
    ('[{"image": "COCO_1.5", "caption": "a"}, {"image": 9, "caption": "b"}]', {"COCO_1.5": "a", "000000000009": "b"}),
])
def test_cells_and_names(tmp_path, content, expected):
    (tmp_path / "list").write_text(content)
    process_captions(tmp_path / "list", tmp_path / "out")
    found = {path.relative_to(tmp_path / "out"): path.read_text() for path in (tmp_path / "out").rglob("*.txt")}
    assert found == {Path(name + ".txt"): text + "\n" for name, text in expected.items()}


TABLE, LINE = "image,caption\n" + "1.jpg,a\n" * 99, '{"image": "1.jpg", "text": "a"}\n' * 99
COMMENTS = "image_name| comment_number| comment\n" + "1.jpg| 0| a\n" * 99


@pytest.mark.parametrize("content, detail", [
    (COMMENTS + "1.jpg| 4   A dog\n", "has 2 columns, not 3"), (TABLE + ",b\n", "names no image"),
    (TABLE + "1.jpg,\n", ""), (LINE + '{"image": "1.jpg", "te\n', "is not a JSON object"),
    (LINE + '{"image": "1.jpg", "text": 3}\n', "'text' that is not text: 3"),
    (LINE + '{"image": {}, "text": "a"}\n', "neither an integer nor text"),
])
def test_bad_rows_are_left_out_and_listed(tmp_path, content, detail):
    source, out = tmp_path / "list", tmp_path / "out"
    source.write_text(content)
    assert process_captions(source, out).captions == 99
    (line,) = skipped_in(out)
    assert detail in line["detail"] and bool(line["detail"]) == bool(detail)
    assert line["path"].endswith(("99", "100", "101"))
    assert len([caption for caption in read_captions([str(source)]) if caption]) in (99, 100)
    refused("--max-bad-fraction 0.001", process_captions, source, out, max_bad_fraction=0.001)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "who,what\n1.jpg,A cat\n", "in its first line, 'who,what';.*--caption-column"),
    ("a.json", '[{"who": "1.jpg", "what": "A cat"}]', "keys found: who, what.*--caption-column"),
    ("a.jsonl", '{"who": "1.jpg"}\n{"what": "A cat"}\n', "keys found: who, what.*--caption-column"),
])
def test_lists_that_cannot_be_told_show_their_names(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    refused(message, process_captions, tmp_path / name, tmp_path / "out")
    refused(message, list, read_captions([str(tmp_path / name)]))
    named = {"image_column": "who", "caption_column": "other"}
    refused("--caption-column", process_captions, tmp_path / name, tmp_path / "out", **named)


def test_text_is_no_list(tmp_path):
    for content in ("a sign with letters, text\nimage\n", "[A sign] x\n{y\n", "1, 2\n3\n", '"a", b\n'):
        (tmp_path / "lines.txt").write_text(content)
        assert list(read_captions([str(tmp_path / "lines.txt")])) == content.split("\n")


def test_wrong_places_and_flags_are_named(tmp_path):
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04\xff\xfe")
    (tmp_path / "file").write_text("")
    source = write_json(tmp_path / "c.json", [annotation(1, "a")])
    long_name = write_json(tmp_path / "long.json", [annotation("n" * 300, "a")])
    for captions, out, complaint in (
        (tmp_path / "none", "out", "no such file.*download_coco_dataset.sh"), (tmp_path, "out", "cannot be read"),
        (tmp_path / "archive.zip", "out", "not UTF-8"), (long_name, "out", "--out-dir .*cannot write"),
        (source, "file", "--out-dir .*is a file, not a folder"),
    ):
        refused(complaint, process_captions, captions, tmp_path / out)
    refused("unknown flag '--out'. Did you mean '--out-dir'", main, ["--out", "x"], kind=UsageError)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_the_commands(tmp_path, monkeypatch):
    """Two as processes, and the module, which would take the seconds of importing PyTorch, in this one."""
    source, out = write_json(tmp_path / "c.json", [annotation(139, "A room .")]), tmp_path / "out"
    flags = ["--captions", str(source), "--out-dir", str(out)]
    for command in ("data/process_trainset.py", "process_captions.py"):
        done = run_script(command, *flags)
        assert done.returncode == 0 and "1 captions of 1 images; 1 text files written" in done.stderr
        assert (out / "000000000139.txt").read_bytes() == b"A room.\n"
        (out / "000000000139.txt").unlink()
    monkeypatch.setattr(sys, "argv", ["process_trainset", *flags])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    refused("0", runpy.run_module, "data.process_trainset", run_name="__main__", kind=SystemExit)
    assert (out / "000000000139.txt").read_bytes() == b"A room.\n"
    source.write_text("{")  # the short name fails in one line from any folder
    done = run_script(ROOT / "process_captions.py", "--captions", "c.json", "--out-dir", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: --captions c.json: the file is truncated; download it again"


@pytest.mark.skipif(not COCO.is_file(), reason="needs ../shared/data/captions_val2017.json")
@pytest.mark.parametrize("images, captions", [(300, 1501), pytest.param(5000, 25014, marks=pytest.mark.slow)])
def test_validation_captions_of_coco(tmp_path, images, captions):
    content = json.loads(COCO.read_text(encoding="utf-8"))
    kept = {image["id"]: image["file_name"] for image in content["images"][:images]}
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    counts = process_captions(write_json(tmp_path / "c.json", annotations, kept), tmp_path / "out")
    assert (counts.images, counts.captions, counts.written) == (images, captions, images)
    expected = {}
    for entry in annotations:
        text = entry["caption"].replace("\n", " ").strip()
        while "  " in text:
            text = text.replace("  ", " ")
        expected.setdefault(f"{entry['image_id']:012}.txt", []).append(text.replace(" .", "."))
    found = {path.name: path.read_text(encoding="utf-8").splitlines() for path in (tmp_path / "out").iterdir()}
    assert found == expected
