"""Files of prompts, those of benchmarks too, and scores of images by functions of the user."""
from __future__ import annotations

import json

import pytest
import torch
from helpers import refused

import evaluate
from dalle.scoring import Scorers, as_bytes, from_bytes, load_scorer, scores_report, summary
from examples.scorers import HUES, colour_names
from utils.prompt_lists import read_prompts

LISTS = {
    "geneval.jsonl": ['{"tag": "colors", "include": [{"class": "car"}], "prompt": "a red car"}',
                      '{"tag": "counting", "include": [], "prompt": " two dogs "}'],
    "drawbench.csv": ["Prompts,Category", '"a red car, parked",Colors', "two dogs,Counting"],
    "parti.tsv": ["Prompt\tCategory\tChallenge\tNote", 'a "red" car\tVehicles\tBasic\t', "two dogs\tAnimals\tStyle\tx"],
    "list.json": ['[{"caption": "a red car"}, {"caption": "two dogs"}]'],
    "plain.txt": ["a red car, parked | text", "", "  two dogs"], "word.txt": ["prompt", "two dogs"],
    "word.csv": ["prompt", "a red car", "two dogs"],
}
FIRST = {"drawbench.csv": "a red car, parked", "parti.tsv": 'a "red" car', "plain.txt": "a red car, parked | text",
         "word.txt": "prompt"}  # fmt: skip
RECORDS = {
    "geneval.jsonl": {"tag": "colors", "include": [{"class": "car"}], "prompt": "a red car"},
    "drawbench.csv": {"Prompts": "a red car, parked", "Category": "Colors"},
    "parti.tsv": {"Prompt": 'a "red" car', "Category": "Vehicles", "Challenge": "Basic", "Note": ""},
    "list.json": {"caption": "a red car"}, "word.csv": {"prompt": "a red car"},
}


@pytest.mark.parametrize("name", LISTS)
def test_prompts_of_a_file(name, tmp_path):
    (tmp_path / name).write_text("\n".join(LISTS[name]) + "\n")
    first, second = read_prompts(str(tmp_path / name))
    assert (first.text, second.text) == (FIRST.get(name, "a red car"), "two dogs")
    assert first.record == RECORDS.get(name, {"prompt": first.text})


def test_prompts_of_another_column_and_files_that_are_none(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("id,words\n1,a red car\n")
    assert [prompt.text for prompt in read_prompts(str(file), "words")] == ["a red car"]
    refused("--prompts-file .*: no column of captions .*--caption-column", read_prompts, str(file))
    refused("--prompts-file .*no such file", read_prompts, str(tmp_path / "none.csv"))
    file.write_text("prompt,id\na,b,c\n")
    refused("--prompts-file .*: row 2 has 3 columns, not 2", read_prompts, str(file))
    file.write_bytes(b"\x00")
    refused("--prompts-file .*: not a text file", read_prompts, str(file))


def swatch(*colours):
    """Stripes of these colours, uint8 (3, 8, 8 * n)."""
    return torch.cat([torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8) for c in colours], dim=2)


def test_colours_of_captions():
    images = torch.stack([
        swatch((220, 20, 30), (20, 60, 220)), swatch((220, 20, 30), (200, 30, 30)), swatch((9, 9, 9), (255, 255, 255)),
        swatch((250, 240, 10), (0, 0, 0)),
    ])  # fmt: skip
    found = colour_names(images, ["a Red car and a blue one", "red and blue", "a red hat", "sky"], [{}] * 4)
    assert found == [{"colours_present": 1}, {"colours_present": 0.5}, {"colours_present": 0}, {}]
    assert colour_names(images[3:], ["yellow"], [{}]) == [{"colours_present": 1}] and len(HUES) == 6


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the body of a scorer's function into a module of the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(body, name):
        (tmp_path / f"{name}.py").write_text(f"def score(images, captions, records):\n    return {body}\n")
        return f"{name}:score"

    return write


def test_means_over_all_and_by_category(module):
    body = '[{"n": r["n"], "x": True} if r["n"] else {} for r in records if images.add_(1).any()]'
    scorers = Scorers([module(body, "counts_of_records")])
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    records = [{"n": 1, "Tag": "a"}, {"n": 0, "Tag": "a"}, {"n": 4, "Tag": "b"}, {"n": 3, "Tag": "a", "other": "c"}]
    parts = [as_bytes(scorers.score(images, ["", ""], part)) for part in (records[:2], records[2:])]
    found = summary(from_bytes(torch.cat(parts)), records)
    assert not images.any()  # scorers have a copy
    assert len(scorers.identity["counts_of_records:score"]) == 64
    groups = {"a": {"mean": 2.0, "count": 2}, "b": {"mean": 4.0, "count": 1}}
    assert found["n"] == {"mean": 8 / 3, "count": 3, "by": {"Tag": groups}} and found["x"]["mean"] == 1
    lines = scores_report([found, found])
    assert lines[0].split() == ["n,", "3", "images", "2.667", "2.667"] and lines[1].startswith("  Tag a, 2 images")


@pytest.mark.parametrize("body, message", [
    ("[{}]", "must return a dictionary for each of 2 images, not 1 items"), ("None", "not NoneType"),
    ("[1, 2]", "must return a dictionary"), ("[{'a': float('nan')}] * 2", "'a' is not a finite number"),
    ("[{'a': 'b'}] * 2", "ValueError"),
    ("exit(0)", "SystemExit: 0"), ("1 / 0", r"ZeroDivisionError: division by zero \(wrong_\d+\.py, line 2\)"),
])
def test_a_scorer_that_is_wrong(module, body, message):
    name = module(body, f"wrong_{abs(hash(body))}")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    refused(f"^--scorer {name}: .*{message}", Scorers([name]).score, images, ["", ""], [{}, {}])


@pytest.mark.parametrize("name, message", [
    ("json", "give a module and a function"), ("no_such_module:x", "ModuleNotFoundError"),
    ("json:no", "AttributeError"), ("json:__name__", "__name__ is not a function"),
])
def test_a_scorer_that_is_not_there(name, message):
    refused(f"^--scorer {name}: .*{message}", load_scorer, name)


def test_a_model_is_scored_on_a_file_of_prompts(tmp_path, capsys):
    file = tmp_path / "parti.tsv"
    file.write_text("Prompt\tCategory\nred apple\tFood\npizza\tFood\nblue circle\tShapes\n")
    words = ["--dalle-path", "demo", "--device", "cpu", "--prompts-file", str(file), "--num-images", "6"]
    words += ["--scorer", "examples.scorers:colour_names", "--cond-scale", "1", "2"]
    evaluate.main([*words, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["metrics"]
    first, second = (row["scores"]["colours_present"] for row in rows)
    assert first["count"] == second["count"] == 4 and first["by"]["Category"]["Food"]["count"] == 2
    assert first["mean"] > 0
    printed = capsys.readouterr().out
    assert "colours_present, 4 images" in printed and "  Category Shapes, 2 images" in printed


@pytest.mark.parametrize("words, message", [
    ("--metrics fid", "--prompts-file has no images to compare with"), ("", "--prompts-file has no images"),
    ("--metrics is --input-folder x", "--input-folder has no use with --prompts-file"),
    ("--metrics is --sheet x.png", "--sheet has no use with --prompts-file"),
])
def test_prompts_are_no_pairs(words, message):
    refused(message, evaluate.main, ["--dalle-path", "demo", "--prompts-file", "x", *words.split()])
    refused("--scorer is for sampled images", evaluate.main, "--images x --metrics is --scorer a:b".split())
    refused("--caption-column needs --prompts-file", evaluate.main, "--dalle-path demo --caption-column a".split())
