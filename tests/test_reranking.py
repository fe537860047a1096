"""Images ordered by CLIP or likelihood, and completion, in generate.py, the API and the sampling example."""
from __future__ import annotations

import json
import logging
import socket
import sys
import types

import numpy as np
import pytest
import torch
from helpers import ROOT, Brightness, refused
from mindalle_folder import CAPTIONS, FormulaClip, clip_images, clip_preprocess, clip_tokenize
from PIL import Image

import generate
from dalle import generation
from dalle.completion import completion_codes
from dalle.journal import rank
from dalle.loading import load
from dalle.reranking import ClipRanker
from dalle.utils.utils import clip_score, clip_similarity
from examples import sampling_ex
from utils.errors import UsageError, UserError


@pytest.fixture
def run(mindalle_folder, tmp_path):
    """Run generate.py in this process; returns what its generation.json says of one caption."""

    def run(text, flags, *more):
        base = ["--dalle_path", str(mindalle_folder), "--outputs_dir", str(tmp_path / "out"), "--device", "cpu"]
        generate.main([*base, "--text", text, "--format", "png", "--top_k", "0", *flags.split(), *map(str, more)])
        name = text.partition("|")[0].replace(" ", "_")
        return json.loads((tmp_path / "out" / name / "generation.json").read_text(encoding="utf-8"))

    return run


class Encoders(torch.nn.Module):
    """An object like those of `clip` and `open_clip`: features are the mean colour, and the prompt's three numbers."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) @ self.weight

    def encode_text(self, tokens):
        return tokens.float() @ self.weight


COLOURS = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1]}


def tokenize(texts):
    return torch.tensor([COLOURS[text] for text in texts])


def to_pixels(picture):
    return torch.tensor(np.array(picture)).permute(2, 0, 1).float() / 255


@pytest.fixture
def images():
    """Red, green, blue, and a dark red that is nearer to red than the others are."""
    rows = np.array([[1, 0.1, 0.2], [0.2, 1, 0.1], [0.1, 0.2, 1], [0.5, 0.2, 0.2]], dtype=np.float32)
    return np.broadcast_to(rows[:, None, None], (4, 8, 8, 3))


def test_clip_score_orders_by_cosine(images, monkeypatch):
    model = Encoders()
    assert clip_score("red", images, model, to_pixels, "cpu", tokenizer=tokenize).tolist() == [0, 3, 1, 2]
    assert clip_score("blue", images, model, to_pixels, "cpu", tokenizer=tokenize).tolist()[0] == 2
    scores = clip_similarity("green", images, model, to_pixels, tokenizer=tokenize)
    pixels = np.floor(images[:, 0, 0] * 255)
    assert np.allclose(scores, pixels[:, 1] / np.linalg.norm(pixels, axis=1), atol=1e-5)
    # Without a tokenizer that of the model's package.
    monkeypatch.setitem(sys.modules, "clip", types.SimpleNamespace(tokenize=tokenize))
    assert clip_score("green", images, model, to_pixels, "cpu").tolist()[0] == 1
    # A ranker alone is enough.
    assert clip_score("white", images, Brightness()).tolist()[-1] == 3
    assert clip_score("dark", images, Brightness()).tolist()[0] == 3


def test_clip_score_gives_the_published_order(monkeypatch):
    """That of the published function, with an object like those of OpenAI's package (see assets/)."""
    golden = json.loads((ROOT / "tests" / "assets" / "mindalle_golden.json").read_text())["clip_ranks"]
    monkeypatch.setitem(sys.modules, "clip", types.SimpleNamespace(tokenize=clip_tokenize))
    options = {"model_clip": FormulaClip(), "preprocess_clip": clip_preprocess, "device": "cpu"}
    ranks = [clip_score(prompt=caption, images=clip_images(), **options) for caption in CAPTIONS[:3]]
    assert [rank.tolist() for rank in ranks] == golden and golden[0] != golden[1]


@pytest.mark.parametrize("which, model, preprocess, message", [
    (0, Encoders, to_pixels, r"expected an array \(N, H, W, 3\), got \(8, 8, 3\)"),
    (slice(None), lambda: torch.nn.Linear(1, 1), to_pixels, "model_clip is a Linear"),
    (slice(None), Encoders, None, "preprocess_clip must be"),
    (slice(None), Encoders, to_pixels, "give clip_score the model's tokenizer"),
])
def test_clip_score_names_what_it_cannot_use(images, which, model, preprocess, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(UserError, match=message):
        clip_score("red", images[which], model(), preprocess)


def test_clip_orders_the_images_and_keep_cuts(run, monkeypatch, tmp_path):
    plain = run("white", "--num_images 5")["images"]
    means = [float(np.asarray(Image.open(tmp_path / "out" / "white" / image["file"])).mean()) for image in plain]
    order = sorted(range(5), key=lambda index: -means[index])
    monkeypatch.setattr(generation, "ClipRanker", Brightness)
    for flags, kept in (("", 5), ("--keep 2 --batch_size 2", 2)):
        images = run("white", f"--num_images 5 --clip_path x {flags}")["images"]
        assert [image["candidate"] for image in images] == order[:kept]
        for part in ("codes", "seed"):
            assert [image[part] for image in images] == [plain[index][part] for index in order[:kept]]
        assert np.allclose([image["clip_score"] for image in images], np.array(means)[order[:kept]] / 255, atol=1e-6)
        assert [image["file"] for image in images] == [f"{index}.png" for index in range(kept)]
    assert len(list((tmp_path / "out" / "white").glob("[0-9].png"))) == 2
    images = run("dark|white", "--num_images 3 --clip_path x --batch_size 64")["images"]
    dark = [image["clip_score"] for image in images]
    assert dark == sorted(dark, reverse=True) and dark[0] < 0


def test_without_clip_the_likeliest_are_kept(run):
    plain = run("a cat", "--num_images 6")["images"]
    kept = run("a cat", "--num_images 6 --keep 3")
    likelihoods = sorted((image["log_likelihood"] for image in plain), reverse=True)[:3]
    assert np.allclose([image["log_likelihood"] for image in kept["images"]], likelihoods, atol=1e-3)
    assert "clip_score" not in kept["images"][0] and kept["settings"]["keep"] == 3


def test_best_holds_no_more_than_it_keeps():
    scores = enumerate([0.1, None, 0.5, 0.5, 0.2])
    records = [{"number": number, "clip_score": score, "log_likelihood": 0} for number, score in scores]
    assert [record["number"] for record in sorted(records, key=rank)] == [2, 3, 4, 0, 1]


def test_completion_keeps_what_the_mask_leaves(run, mindalle_folder, tmp_path):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    picture.save(tmp_path / "given.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    expected = completion_codes(load(mindalle_folder), picture, mask)
    kept = expected >= 0
    assert kept.sum() == 12
    drawn = []
    for given in (tmp_path / "mask.png", "0.5,0,1,0.5"):
        report = run("a cat", "--num_images 4 --image", tmp_path / "given.png", "--mask", given)
        codes = torch.tensor([image["codes"] for image in report["images"]])
        assert torch.equal(codes[:, kept], expected[kept].expand(4, -1)) and report["settings"]["mask"] == str(given)
        drawn.append(codes)
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) > 1
    holed = picture.convert("RGBA")
    holed.paste((0, 0, 0, 0), (8, 0, 16, 8))
    holed.save(tmp_path / "holed.png")
    run("a cat", "--num_images 1 --image", tmp_path / "holed.png")
    refused("--image needs --mask", run, "a cat", "--image", tmp_path / "given.png", kind=UsageError)


@pytest.mark.parametrize("flags, message", [
    ("--mask 0,0,1,1", "--mask needs --image"),
    ("--image a.png --prime-image b.png", "--image and --prime-image exclude each other"),
    ("--image /nowhere.png --mask 0,0,1,1", "--image /nowhere.png cannot be read: No such file"),
    ("--keep 9 --num-images 8", "--keep 9: only --num-images 8 are sampled"),
    ("--keep 0", "--keep: must be at least 1"),
])
def test_flags_that_cannot_be_are_named(run, flags, message):
    refused(message, run, "a", flags)


def test_the_sampling_example_saves_the_best(mindalle_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "clip", None)
    caplog.set_level(logging.INFO)
    flags = f"--model {mindalle_folder} -n 5 --prompt a/cat --keep 3 --seed 4 --device cpu".split()
    sampling_ex.main([*flags, "--result-path", str(tmp_path / "a")])
    assert len(list((tmp_path / "a").glob("*_[012].png"))) == 3 and "ranked by likelihood" in caplog.text
    monkeypatch.setattr(sampling_ex, "ClipRanker", Brightness)
    sampling_ex.main([*flags, "--result-path", str(tmp_path / "b"), "--clip-path", "x", "--softmax_temperature", "1.5"])
    means = [np.asarray(Image.open(path)).mean() for path in sorted((tmp_path / "b").iterdir())]
    assert len(means) == 3 and means == sorted(means, reverse=True)
    flags += ["--softmax-temperature", "1e-38"]
    refused("--softmax-temperature: must be at least 1e-06", sampling_ex.main, flags)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model with random weights in the layout of transformers."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    torch.manual_seed(0)
    text = dict(size, vocab_size=54, max_position_embeddings=12, **ends)
    vision = dict(size, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(path)
    return path


def test_a_local_clip_scores_without_network(clip_folder, monkeypatch, images):
    monkeypatch.delattr(socket, "create_connection")
    ranker = ClipRanker(clip_folder)
    pictures = [Image.fromarray((image * 255).astype(np.uint8)).resize((20, 24)) for image in images]
    scores = ranker.similarity("red cat", pictures)
    tokens = ranker.tokenizer(["red cat"], return_tensors="pt")
    pixels = ranker.pixels(pictures)
    assert pixels.shape == (4, 3, 16, 16)
    assert torch.allclose(pixels[0, :, 8, 8], (torch.tensor([255.0, 25, 51]) / 255 - 0.5) / 0.25, atol=1e-5)
    with torch.no_grad():
        expected = ranker.model(pixel_values=pixels, **tokens).logits_per_text[0] / ranker.model.logit_scale.exp()
    assert torch.allclose(scores, expected, atol=1e-5) and scores.unique().numel() > 1
    assert len(ranker.similarity("word " * 50, pictures)) == 4
    assert torch.allclose(clip_similarity("red cat", images, ranker), ranker.similarity("red cat", pictures), atol=0.2)


def test_a_wrong_clip_path_is_named(tmp_path):
    pytest.importorskip("transformers")
    refused(r"--clip-path .*: not a folder of a CLIP model \(it lacks config.json\)", ClipRanker, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused("--clip-path .*cannot be read as a CLIP model", ClipRanker, tmp_path)
