"""generate.py and the part of dalle/ that it stands on: loading, drawing, folders of prompts, files."""
from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ROOT, TINY_VQGAN, TinyModel, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import generate
from bpe import load_tokenizer
from checkpoints import dalle_checkpoint, save_checkpoint
from checkpoints.vqgan import load_vqgan
from dalle import loading
from dalle.loading import load
from dalle.models import Dalle
from dalle.outputs import Outputs
from dalle.prompt_folders import MAX_NAME_LEN, folder_name, lock_folder, prompt_folders, with_digest
from data.images import load_image
from models.dalle import DalleModel
from models.vqgan import VQGAN, VqganConfig
from sampling import decode, image_seed, prime_rows, to_uint8
from sampling.driver import all_shares
from utils.errors import UsageError
from utils.files import sha256_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(files):
    return load(files.dalle)


@pytest.fixture
def run(files, tmp_path):
    """Run generate.py in this process, with flags in one string; returns {folder name: its generation.json}."""

    def run(text, flags="", *more):
        argv = ["--dalle_path", str(files.dalle), "--outputs_dir", str(tmp_path / "out"), "--device", "cpu"]
        generate.main([*argv, *flags.split(), *map(str, more), *(["--text", text] if text else [])])
        reports = (tmp_path / "out").glob("*/generation.json")
        return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in reports}

    return run


@pytest.fixture
def codes(run):
    return lambda text, flags, *more: codes_of(run(text, flags, *more)[text])


def codes_of(report):
    return [image["codes"] for image in report["images"]]


# Output --------------------------------------------------------------------------------------------------------------


def test_writes_the_published_layout_and_a_report(files, run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report = run("a plate of food.", "--num_images 5 --batch_size 2 --seed 7")["a_plate_of_food."]
    folder = tmp_path / "out" / "a_plate_of_food."
    pictures = [f"{index}.jpg" for index in range(5)]
    assert {path.name for path in folder.iterdir()} == {*pictures, "caption.txt", "grid.png", "generation.json"}
    assert (folder / "caption.txt").read_text() == "a plate of food.\n"
    assert report["prompt"] == report["caption"] == "a plate of food." and report["complete"] is True
    assert report["settings"]["top_k"] == 0.99 and report["settings"]["num_images"] == 5
    assert report["checkpoint"]["sha256"] == sha256_file(files.dalle)
    assert report["vqgan"]["sha256"] == sha256_file(files.vqgan_model)
    assert report["tokenizer"] == files.tokenizer.identity
    assert report["text_tokens"] == files.tokenizer.encode("a plate of food.")[:10]
    assert [image["file"] for image in report["images"]] == pictures
    assert [image["seed"] for image in report["images"]] == [image_seed(7, index) for index in range(5)]
    with Image.open(folder / "0.jpg") as image, Image.open(folder / "grid.png") as grid:
        assert image.format == "JPEG" and image.size == (16, 16)
        assert grid.width > 3 * 128 and grid.height > 2 * 128
    assert float(re.search("throughput: *(.*?) images/sec", caplog.messages[-1]).group(1)) > 0


def test_pixels_codes_and_likelihoods_are_those_of_the_model(loaded, run, files, tmp_path):
    report = run("a cat", "--num_images 3 --top_k 0 --format png")["a_cat"]
    found = torch.tensor(codes_of(report))
    for index, picture in enumerate(decode(loaded, found)):  # without stretching
        assert torch.equal(load_image(str(tmp_path / "out" / "a_cat" / f"{index}.png"), 16), picture)
    with torch.no_grad():
        _, logits = loaded.dalle(files.tokenizer.tokenize("a cat", 10).expand(3, -1), found)
    expected = torch.log_softmax(logits, -1).gather(-1, found[..., None]).sum((1, 2))
    assert torch.allclose(torch.tensor([image["log_likelihood"] for image in report["images"]]), expected, atol=1e-3)
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0])).tolist() == [0, 0, 64, 128, 255, 255]


# The same image whatever is drawn beside it --------------------------------------------------------------------------


def test_an_image_depends_on_seed_and_index_alone(run, codes):
    flags = "--top_k 0 --seed 3 --num_images"
    alone = codes("cat", f"{flags} 5 --batch_size 5")
    assert len(set(map(tuple, alone))) == 5
    for batch_size in (1, 2, 64):
        reports = run("dog|cat|x", f"{flags} 5 --batch_size {batch_size}")
        assert codes_of(reports["cat"]) == alone != codes_of(reports["dog"])
    assert codes("cat", f"{flags} 2") == alone[:2] and codes("cat", f"{flags} 5 --seed 4")[0] not in alone
    seeds = [image_seed(seed, index) for seed in range(50) for index in range(-1, 50)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**48


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_full_batches_cover_every_image_once(num_prompts, num_images, batch_size):
    shares = list(all_shares(num_prompts, num_images, batch_size))
    assert [share.num_images for share in shares[:-1]] == [batch_size] * (len(shares) - 1)
    # A prompt's images come in their order, so that they can be written as they come.
    drawn = [place for share in shares for place in zip(*share)]
    assert drawn == list(itertools.product(range(num_prompts), range(num_images)))
    for share in shares:  # as sample_codes lays out equally many images of each prompt that it reads
        read = share.to_read()
        assert [prompt for prompt in read for _ in range(share.num_images // len(read))] == list(share.prompts)
        assert [place for part in share.split(3) for place in zip(*part)] == list(zip(*share))


# Flags ---------------------------------------------------------------------------------------------------------------


def test_the_published_command_works_word_for_word(files, tmp_path, monkeypatch):
    command = 'python generate.py --dalle_path ./output/ckpt/dalle_799.pt --outputs_dir ./output --bpe_path '
    command += 'models/bpe/bpe_yttm_vocab.txt --text "A plate of food has potatoes and fruit."'
    vocabulary = load_tokenizer(str(ROOT / "bpe" / "bpe_yttm_vocab.txt"))
    config = dataclasses.replace(files.model.config, num_text_tokens=vocabulary.vocab_size)
    monkeypatch.chdir(tmp_path)
    training = dict(files.identity, tokenizer=vocabulary.identity)
    files.save(tmp_path / "output/ckpt/dalle_799.pt", training, DalleModel(config).state_dict(), config)
    generate.main(shlex.split(command)[2:])
    folder = tmp_path / "output" / "A_plate_of_food_has_potatoes_and_fruit."
    assert len(list(folder.glob("*.jpg"))) == 128
    assert json.loads((folder / "generation.json").read_text())["tokenizer"] == vocabulary.identity


def test_logits_that_are_not_finite_are_told_of(files, run, caplog):
    weights = dict(files.model.state_dict())
    weights["image_head.bias"] = torch.full_like(weights["image_head.bias"], float("nan"))
    broken = files.save("broken.pt", files.identity, weights)
    report = run("a", "--num_images 3 --batch_size 2 --dalle_path", broken)["a"]
    assert [image["log_likelihood"] for image in report["images"]] == [None] * 3  # JSON has no such numbers
    Dalle(load(broken)).generate("a", num_candidates=3, progress=False)
    told = [re.search("not finite for (.*) images", message) for message in caplog.messages]
    assert [match.group(1) for match in told if match] == ["2 of 2", "1 of 1", "3 of 3"]


def test_greedy_top_k_top_p_temperature_and_guidance(run, codes):
    greedy = codes("a", "--num_images 3 --temperature 0")
    assert greedy[0] == greedy[1] == greedy[2]
    for flags in ("--top_k 1", "--top_p 0.000001", "--top_k 0.99"):  # a hundredth of 24 codes: one
        assert codes("a", f"--num_images 1 {flags}") == greedy[:1]
    free = codes("a", "--num_images 3 --top_k 0")
    assert free[0] != greedy[0] and codes("a", "--num_images 3 --top_k 24") == free
    assert codes("a", "--num_images 3 --top_k 0 --temperature 0.5") != free
    assert codes("a", "--num_images 2 --top_k 0.5") == codes("a", "--num_images 2 --top_k 12")  # half of 24 codes
    assert codes("a", "--num_images 1 --temperature 0 --cond_scale 8") != greedy[:1]
    reports = run("zebra|apple", "--num_images 1 --temperature 0 --cond_scale 0")  # ignores the caption
    assert codes_of(reports["zebra"]) == codes_of(reports["apple"])


def test_priming_keeps_the_upper_rows(loaded, run, codes, tmp_path):
    prime = tmp_path / "prime.png"
    Image.effect_noise((40, 24), 90).convert("RGB").save(prime)
    with torch.no_grad():
        own = loaded.vqgan.encode(load_image(str(prime), 16)[None].float() / 255)[0].tolist()
    found = codes("a", "--num_images 3 --top_k 0 --prime_rows 3 --prime_image", prime)
    assert all(row[:12] == own[:12] for row in found) and len({tuple(row[12:]) for row in found}) > 1
    report = run("a", "--num_images 1 --prime_image", prime)["a"]
    assert codes_of(report)[0][:4] == own[:4] and report["settings"]["prime_rows"] == 1
    assert [prime_rows(grid) for grid in (1, 4, 8, 16, 32)] == [1, 1, 3, 7, 14]


def test_gentxt_draws_from_the_completed_caption(run, codes, files, tmp_path):
    report = run("ab", "--num_images 1 --gentxt --top_k 0")["ab"]
    assert report["prompt"] == "ab" and report["caption"].startswith("ab") and len(report["caption"]) > 2
    assert report["text_tokens"][:3] == files.tokenizer.encode("ab")
    assert (tmp_path / "out" / "ab" / "caption.txt").read_text(encoding="utf-8") == report["caption"] + "\n"
    assert codes("ab", "--num_images 1 --top_k 0") != codes_of(report)


def test_prompts_of_a_file_and_of_text(run, files, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_bytes("\ufefffirst line\n\n  b|c \r\nfirst line\n".encode("utf-8"))
    flags = ("--num_images 1 --prompts_file", tmp_path / "prompts.txt")
    assert set(run(None, *flags)) == {"first_line", "b|c"} and "1 duplicate captions are ignored" in caplog.text
    assert set(run("x| y ||", *flags)) == {"first_line", "b|c", "x", "y"}
    # Both spellings of flags, a value with a dash, and a caption that is too long.
    assert run("-rf", "--num-images=1 --batch-size 1")[folder_name("-rf")]["prompt"] == "-rf"
    report = run("abcdefghijklmnop", "--num_images 1")["abcdefghijklmnop"]
    assert report["text_tokens"] == files.tokenizer.encode("abcdefghijklmnop")[:10]
    assert "10 tokens of a caption: 'abcdefghijklmnop' (17 tokens) is truncated" in caplog.text
    run("一个苹果", "--num_images 1")
    assert "--text: the vocabulary lacks 100 % of the characters" in caplog.text


def test_ten_megabytes_of_text(run, files, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 2_000_000, encoding="utf-8")
    ((name, report),) = run(None, "--num_images 1 --prompts_file", tmp_path / "long.txt").items()
    assert name == ("word_" * 20) and report["text_tokens"] == files.tokenizer.encode("word word word")[:10]


# Folders -------------------------------------------------------------------------------------------------------------


def test_the_ordinary_name_is_the_published_one_and_the_same_of_two_keep_apart_over_runs(run):
    prompts = "A plate of food has potatoes and fruit.|woman astronaut: medium-dark skin tone|été à la plage|一只猫"
    prompts += "|two  blanks|🧑🏽\u200d🚀 in space|what?!|50% *off*|a_b|" + "a" * 150
    for prompt in prompts.split("|"):
        assert folder_name(prompt) == prompt.replace(" ", "_")[:100]
    reports = run("a b|a_b", "--num_images 1")
    names = {report["prompt"]: name for name, report in reports.items()}
    assert names["a b"] == "a_b" and names["a_b"] == with_digest("a_b", "a_b")
    again = run("a_b", "--num_images 2")
    assert again["a_b"] == reports["a_b"] and len(again[names["a_b"]]["images"]) == 2


hostile = st.text(st.sampled_from("./\\-~ \0\n\r\t\u2028\u202eaé猫🧑\u200d\ud800:|_"), max_size=120)
hostile |= st.text(max_size=300)


def hostile_examples(test):
    prompts = r"../../etc/passwd /etc/passwd .. . \\server\share -rf ~root CON nul.txt".split()
    for prompt in (*prompts, "\0", "🧑" * 100):
        test = example(prompt)(test)
    return test


@settings(max_examples=300, deadline=None)
@given(hostile)
@hostile_examples
def test_no_prompt_leaves_its_folder(prompt):
    name = folder_name(prompt)
    assert 0 < len(name) <= MAX_NAME_LEN and len(name.encode("utf-8")) <= 255
    assert not set(name) & set("/\\\0\n\r ") and name[0] not in "-.~"
    kinds = {unicodedata.category(character) for character in name.replace("\u200d", "")}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
    assert (Path("/outputs") / name).parent == Path("/outputs") and name not in (".", "..", "CON", "nul.txt")
    assert folder_name(prompt) == name and len(with_digest(name, prompt).encode("utf-8")) <= 255


@settings(max_examples=20, deadline=None)
@given(prompts=st.lists(hostile, min_size=2, max_size=6, unique=True))
def test_prompts_never_share_a_folder(tmp_path_factory, prompts):
    outputs = tmp_path_factory.mktemp("outputs")
    folders = prompt_folders(outputs, prompts)
    locks = [lock_folder(folder) for folder in folders]
    # Apart, also where the file system knows no case.
    assert len(locks) == len({folder.name.casefold() for folder in folders}) == len(folders)
    assert sorted(folders) == sorted(outputs.iterdir()) and all(folder.is_dir() for folder in folders)


def test_a_new_run_replaces_the_old_one_whole(run, tmp_path, caplog):
    run("a", "--num_images 4 --format png")
    folder = tmp_path / "out" / "a"
    (folder / "notes.txt").write_text("mine")
    run("a", "--num_images 2")
    names = {"0.jpg", "1.jpg", "caption.txt", "generation.json", "grid.png", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names and "already has" not in caplog.text
    (folder / "7.jpg").write_bytes(b"from somewhere else")
    run("a", "--num_images 1")
    assert (folder / "7.jpg").exists() and not (folder / "1.jpg").exists()
    assert "already has 7.jpg that no generation.json lists" in caplog.text


def test_an_old_report_cannot_name_other_files(run, tmp_path):
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    for name in ("../keep.jpg", "caption.jpg", "0.txt"):
        (folder / name).write_text("keep")
    listed = [{"file": name} for name in ("../keep.jpg", "caption.jpg", "0.txt", "/etc/passwd", 5, None)] + [7]
    for images in (listed, "x", {"a": 1}):
        (folder / "generation.json").write_text(json.dumps({"prompt": "a", "images": images}))
        run("a", "--num_images 1")
        assert all((folder / name).exists() for name in ("../keep.jpg", "caption.jpg", "0.txt"))
    (folder / "generation.json").write_text("[" * 100_000)
    assert run("a", "--num_images 1")["a"]["complete"]


def test_an_interrupted_run_leaves_a_report_of_what_is_there(run, tmp_path, monkeypatch):
    run("a", "--num_images 6 --seed 1")
    add, calls = Outputs.add, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Outputs, "add", interrupted)
    refused("", run, "a", "--num_images 6 --batch_size 2 --seed 2", kind=KeyboardInterrupt)
    folder = tmp_path / "out" / "a"
    report = json.loads((folder / "generation.json").read_text())
    assert report["complete"] is False and report["settings"]["seed"] == 2
    written = sorted(path.name for path in folder.glob("*.jpg"))
    assert [image["file"] for image in report["images"]] == written == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_paths_whose_bytes_are_no_text(run, files, tmp_path):
    name = os.fsdecode(b"model-\xff.pt")
    try:
        (tmp_path / name).write_bytes(files.dalle.read_bytes())
    except OSError:
        pytest.skip("this file system takes text alone")
    assert run("a", "--num_images 1 --dalle_path", tmp_path / name)["a"]["checkpoint"]["name"] == str(tmp_path / name)


# Loading -------------------------------------------------------------------------------------------------------------


def test_parts_are_found_where_training_left_them_or_beside_the_checkpoint(loaded, files, tmp_path):
    assert loaded.tokenizer.identity == files.tokenizer.identity
    assert loaded.vqgan.identity == sha256_file(files.vqgan_model)
    assert loaded.image_size == 16 and not loaded.dalle.training and loaded.checkpoint.epoch == 3
    assert torch.equal(loaded.dalle.state_dict()["image_head.weight"], files.model.state_dict()["image_head.weight"])
    # Beside a checkpoint that moved.
    identity = {
        "tokenizer": dict(files.identity["tokenizer"], path="/gone/letters.txt"),
        "vqgan": dict(files.identity["vqgan"], weights="/gone/vqgan.ckpt", config="/gone/vqgan.yaml"),
    }
    assert load(files.save("moved.pt", identity)).vqgan.identity == sha256_file(files.vqgan_model)
    alone = tmp_path / "moved.pt"
    alone.write_bytes((files.folder / "moved.pt").read_bytes())
    gone = r"{} .* \(/gone/{}\) is not found: give it with {}"
    refused(gone.format("the vocabulary", "letters.txt", "--bpe-path"), load, alone)
    refused(gone.format("the VQGAN", "vqgan.ckpt", "--vqgan-model-path"), load, alone, bpe_path=files.vocabulary)
    assert load(alone, files.vocabulary, files.vqgan_model, files.vqgan_config).image_size == 16
    other = files.other_vocabulary(tmp_path)  # a file that changed since training is not taken
    identity = dict(files.identity, tokenizer=dict(files.identity["tokenizer"], path=str(other)))
    tokenizer = load(files.save("changed.pt", identity)).tokenizer
    assert tokenizer.encode("a") == files.tokenizer.encode("a")  # of the one beside it


def test_other_parts_than_in_training_are_taken_with_a_warning_or_refused(files, tmp_path, caplog):
    complaint = "--bpe-path .*8192 .* the model of --dalle-path .* was trained with 31"
    refused(complaint, load, files.dalle, ROOT / "bpe" / "bpe_yttm_vocab.txt")
    config = VqganConfig(**dict(vars(TINY_VQGAN), num_codes=12))
    config.to_yaml(tmp_path / "small.yaml")
    torch.save(VQGAN(config).state_dict(), tmp_path / "small.ckpt")
    weights, options = tmp_path / "small.ckpt", tmp_path / "small.yaml"
    complaint = "--vqgan-model-path .*12 codes.* --dalle-path .* was trained with 24"
    refused(complaint, load, files.dalle, None, weights, options)
    refused("--vqgan-model-path needs --vqgan-config-path", load, files.dalle, None, weights, kind=UsageError)
    refused("--vqgan-config-path needs --vqgan-model-path", load, files.dalle, None, None, options, kind=UsageError)
    other = files.other_vocabulary(tmp_path)
    torch.save(VQGAN(TINY_VQGAN).state_dict(), tmp_path / "other.ckpt")
    load(files.dalle, other, tmp_path / "other.ckpt", files.vqgan_config)
    assert f"--bpe-path {other} is not the vocabulary that" in caplog.text
    assert f"--vqgan-model-path {tmp_path / 'other.ckpt'} is not the VQGAN that" in caplog.text


def test_without_any_note_the_defaults_are_taken(files, monkeypatch):
    monkeypatch.setattr(
        loading, "default_vqgan", lambda name: (files.vqgan_model, files.vqgan_config) if name == "f16-1024" else None
    )
    unknown = files.save("unknown.pt", {})
    refused(r"--bpe-path \(the CLIP vocabulary, by default\): .* has 49408 entries", load, unknown)
    assert load(unknown, bpe_path=files.vocabulary).vqgan.identity == sha256_file(files.vqgan_model)
    hostile = files.save("hostile.pt", {"tokenizer": {"sha256": 5, "path": ["x"]}, "vqgan": "none"})
    assert load(hostile, bpe_path=files.vocabulary).image_size == 16


def test_the_vqgan_inside_a_published_checkpoint_is_used(files, tmp_path):
    vqgan = load_vqgan(files.vqgan_model, files.vqgan_config)
    checkpoint = dalle_checkpoint(files.model.config.to_dict(), files.model.state_dict(), 3)
    del checkpoint["config"], checkpoint["training"]
    checkpoint["weights"].update({"model.vae.model." + name: tensor for name, tensor in vqgan.state_dict().items()})
    save_checkpoint(tmp_path / "published.pt", checkpoint)
    stored = load(tmp_path / "published.pt", files.vocabulary, None, files.vqgan_config)
    codes = torch.arange(16)[None]
    assert stored.checkpoint.format == "mini-dalle" and torch.equal(stored.vqgan.decode(codes), vqgan.decode(codes))
    complaint = "is not a published one: give its YAML file with --vqgan-config-path"
    refused(complaint, load, tmp_path / "published.pt", files.vocabulary)


def test_averaged_weights_draw_and_those_of_half_precision_in_float32_on_any_grid(files, run, tmp_path):
    """Convolutions take any size: a model trained at 24x24 pixels with a VQGAN made for 16x16 draws 24x24."""
    averaged = {name: tensor.half() + 1 for name, tensor in files.model.state_dict().items()}
    path = files.save("ema.pt", dict(files.identity, engine={"ema": averaged}))
    assert torch.equal(load(path).dalle.state_dict()["norm.bias"], averaged["norm.bias"].float())
    config = dataclasses.replace(files.model.config, grid=6)
    path = files.save("wide.pt", files.identity, DalleModel(config).state_dict(), config)
    run("a", "--num_images 1 --format png --dalle_path", path)
    with Image.open(tmp_path / "out" / "a" / "0.png") as image:
        assert image.size == (24, 24)


def test_demo_means_the_shipped_files(files, monkeypatch, tmp_path):
    parts = {"DALLE": files.dalle, "VQGAN": files.vqgan_model, "VQGAN_CONFIG": files.vqgan_config}
    for name, path in {**parts, "VOCABULARY": files.vocabulary}.items():
        monkeypatch.setattr(loading, f"_DEMO_{name}", path)
    assert load("demo").checkpoint.path == files.dalle
    monkeypatch.setattr(loading, "_DEMO_DALLE", ROOT / "models" / "demo" / "absent.safetensors")
    refused("--dalle-path demo: models/demo/absent.safetensors is missing", load, "demo")


# Errors --------------------------------------------------------------------------------------------------------------


USAGE = [
    ("", "--text: give a caption, or a file of captions with --prompts-file"),
    ("--text |", "--text: no captions found"),
    ("--text a --num_images 0", "--num-images: must be at least 1 and at most 1000000, got 0"),
    ("--text a --num_images many", "--num-images: expected a whole number, got 'many'"),
    ("--text a --batch_size -1", "--batch-size: must be at least 1"),
    ("--text a --top_k -0.1", "--top-k: must be at least 0, got -0.1"),
    ("--text a --top_k 1.5", "--top-k: must be a share below 1 or a whole number, got 1.5"),
    ("--text a --top_p 0", "--top-p: must be above 0 and at most 1"),
    ("--text a --top_p 1.1", "--top-p: must be above 0 and at most 1"),
    ("--text a --parallel 65", "--parallel: must be auto, off or a number of codes from 1 to 64, got 65"),
    ("--text a --temperature nan", "--temperature: expected a number, got 'nan'"),
    ("--text a --temperature 1e-38", "--temperature: must be at least 1e-06 and at most 1e+06, or 0, got 1e-38"),
    ("--text a --cond_scale 1e38", "--cond-scale: must be at least 0 and at most 1e+06, got 1e38"),
    ("--text a on mat", "unexpected argument 'on': options are given as flags, and a value of several words in quotes"),
    ("--text", "--text: expected one argument"),
    ("--text a --prime_rows 2", "--prime-rows needs --prime-image: picture whose upper part"),
    ("--text a --prompts_file=", "--prompts-file"),
]


@pytest.mark.parametrize("flags, message", USAGE)
def test_usage_errors(files, tmp_path, flags, message):
    words = ["--dalle_path", str(files.dalle), "--outputs_dir", str(tmp_path / "out"), *flags.split()]
    told = refused("", generate.main, words, kind=UsageError)
    assert message in told and "\n" not in told and not (tmp_path / "out").exists()


def test_user_errors(run, tmp_path):
    bad, latin, picture = tmp_path / "bad.pt", tmp_path / "latin.txt", tmp_path / "image.png"
    bad.write_bytes(b"text")
    latin.write_bytes(b"a\xe9")
    Image.new("RGB", (8, 8)).save(picture)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"")
    unknown = "--dalle-path /nowhere.pt: no such file, folder or published model. Known names: demo"
    for message, flags in (
        (unknown, "--dalle_path /nowhere.pt"), ("is no checkpoint", f"--dalle_path {bad}"),
        ("--prompts-file /nowhere.txt: no such file", "--prompts_file /nowhere.txt"),
        ("latin.txt: not a text file (it is not UTF-8", f"--prompts_file {latin}"),
        (f"--outputs-dir {bad}: {bad} is a file, not a folder", f"--outputs_dir {bad} --dalle_path {bad}"),
        ("--prime-image /nowhere.png cannot be read: No such file", "--prime_image /nowhere.png"),
        (f"--prime-image {bad} cannot be read", f"--prime_image {bad}"),
        ("--prime-rows: the model has 4 rows", f"--prime_image {picture} --prime_rows 4"),
        (f"--outputs-dir: cannot write {tmp_path / 'out' / 'a'}: File exists", ""),
        *([] if torch.cuda.is_available() else [("--device cuda", "--device cuda")]),
    ):
        assert message in refused("", run, "a", f"--num_images 1 {flags}")
    # In Python errors name arguments.
    refused(r"^path dem: no such .* Did you mean 'demo'\? Known names: demo", Dalle.from_pretrained, "dem")


@pytest.mark.parametrize("share, scale, told", [(0.0, "2", 1), (0.1, "2", 0), (0.0, "1", 0)])
def test_guidance_of_a_model_that_was_not_trained_for_it_is_told_of(files, run, caplog, share, scale, told):
    model = files.save("guided.pt", dict(files.identity, config={"null_cond_prob": share}))
    run("a|b", "--num_images 2 --batch_size 1 --cond_scale", scale, "--dalle_path", model)
    assert caplog.text.count("was trained with --null-cond-prob 0") == told


@pytest.mark.parametrize("target", ["../elsewhere", "another", "nowhere", "a_cat"])
def test_a_link_in_place_of_a_prompts_folder_is_refused_before_anything_is_drawn(run, tmp_path, target):
    for folder in (tmp_path / "elsewhere", tmp_path / "out" / "another"):
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_text("precious")
        (folder / "generation.json").write_text(json.dumps({"prompt": "a cat", "images": [{"file": "0.jpg"}]}))
    (tmp_path / "out" / "a_cat").symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    refused("--outputs-dir: .*/out/a_cat is a symbolic link", run, "a dog|a cat", "--num_images 1")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "elsewhere" / "0.jpg").read_text() == "precious"


def test_a_link_in_place_of_a_file_is_replaced_and_the_outputs_folder_may_be_one(run, tmp_path):
    names = ("0.jpg", "grid.png", "caption.txt", "generation.json")
    (tmp_path / "elsewhere" / "a_cat").mkdir(parents=True)
    (tmp_path / "out").symlink_to("elsewhere")
    for name in names:
        (tmp_path / name).write_text("precious")
        (tmp_path / "out" / "a_cat" / name).symlink_to(tmp_path / name)
    run("a cat", "--num_images 1")
    assert [(tmp_path / name).read_text() for name in names] == ["precious"] * 4
    assert not [name for name in names if (tmp_path / "elsewhere" / "a_cat" / name).is_symlink()]


@pytest.mark.parametrize("where", ["sampling.driver.sample_codes", "models.vqgan.VQGAN.decode_by_parts"])
def test_too_large_a_batch_is_one_line(where, run, monkeypatch):
    full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    monkeypatch.setattr(where, mock.Mock(side_effect=full))
    refused("not enough memory for a batch of 1 image: lower --batch-size", run, "a", "--num_images 1")


def test_as_a_script_errors_are_one_line_on_stderr(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["generate.py", "--dalle_path", "x.pt"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
    error = "error: --text: give a caption, or a file of captions with --prompts-file\n"
    assert (end.value.code, *capfd.readouterr()) == (2, "", error)
