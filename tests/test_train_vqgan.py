"""Stage-1 training: it learns, writes files that load, holds images out, and explains what it cannot do."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import train_vqgan
from models.discriminator import Adversary, PatchDiscriminator
from models.perceptual import PerceptualDistance, load_perceptual
from models.vqgan import VqganConfig, load_vqgan
from utils.errors import UsageError, UserError

TINY = VqganConfig(
    num_codes=16,
    embed_dim=8,
    resolution=32,
    z_channels=8,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=4,
    patch_size=4,
)
DEMO = Path(train_vqgan.__file__).parent / "models" / "demo"


@pytest.fixture
def folder(tmp_path):
    """24 pictures of coloured rectangles, wide and high, in two folders, and a file that is no image."""
    random = numpy.random.default_rng(0)
    images = tmp_path / "images" / "nested"
    images.mkdir(parents=True)
    for i in range(24):
        picture = numpy.full((40, 40 + 8 * (i % 3), 3), 255, dtype=numpy.uint8)
        top, left = random.integers(0, 20, 2)
        picture[top : top + 20, left : left + 20] = random.integers(0, 255, 3)
        Image.fromarray(picture).save(
            str(images.parent / "a{}.png".format(i) if i % 2 else images / "b{}.jpg".format(i))
        )
    (images / "notes.txt").write_text("no image")
    TINY.to_yaml(tmp_path / "tiny.yaml")
    return tmp_path


def arguments(folder, *more):
    fixed = [
        "--input-folder",
        str(folder / "images"),
        "--output",
        str(folder / "out"),
        "--device",
        "cpu",
        "--batch-size",
        "8",
    ]
    return train_vqgan.parse_args(fixed + ["--config", str(folder / "tiny.yaml"), "--log-every", "1"] + list(more))


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_short_run_learns_and_its_files_load(folder):
    report = train_vqgan.train(arguments(folder, "--steps", "40", "--learning-rate", "5e-3", "--evaluate-every", "20"))
    losses = [row["reconstruction"] for row in rows(folder) if "reconstruction" in row]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    model = load_vqgan(folder / "out" / "vqgan.safetensors", folder / "out" / "vqgan.yaml")
    assert model.config == TINY
    assert set(report) == {"psnr", "codes_used", "perplexity"} and rows(folder)[-1]["final"] == report
    assert any("heldout" in row for row in rows(folder))
    with Image.open(str(folder / "out" / "reconstructions.png")) as grid:
        assert grid.size == (16 * 32, 2 * 32)


def test_fine_tuning_starts_from_the_given_weights(folder):
    train_vqgan.train(arguments(folder, "--steps", "30", "--learning-rate", "5e-3"))
    untrained = rows(folder)[0]["reconstruction"]
    weights, config = (str(folder / "out" / name) for name in ("vqgan.safetensors", "vqgan.yaml"))
    (folder / "out" / "metrics.jsonl").unlink()
    start = ["--vqgan_model_path", weights, "--vqgan_config_path", config]
    train_vqgan.train(arguments(folder, "--steps", "1", "--learning-rate", "1e-6", *start))
    first = rows(folder)[0]
    assert first["reconstruction"] < 0.5 * untrained and first["codebook"] > 0


def test_gradient_codebook_and_half_precision(folder):
    train_vqgan.train(
        arguments(
            folder,
            "--steps",
            "6",
            "--codebook-update",
            "gradient",
            "--save-half",
            "--ema-decay",
            "0",
            "--revive-every",
            "2",
        )
    )
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(str(folder / "out" / "vqgan.safetensors")).values()} == {torch.float16}


def test_gumbel_variant_trains(folder):
    document = TINY.to_dict()
    document["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    VqganConfig.from_dict(document).to_yaml(folder / "tiny.yaml")
    train_vqgan.train(arguments(folder, "--steps", "3"))
    assert load_vqgan(folder / "out" / "vqgan.safetensors", folder / "out" / "vqgan.yaml").config.variant == "gumbel"


def test_discriminator_takes_part_from_its_step(folder):
    train_vqgan.train(arguments(folder, "--steps", "4", "--discriminator-start", "2"))
    assert ["generator" in row for row in rows(folder)[:4]] == [False, False, True, True]
    assert all(numpy.isfinite(row["discriminator"]) for row in rows(folder)[2:4])


def test_discriminator_learns_to_tell_apart():
    torch.manual_seed(0)
    adversary = Adversary(3, 1e-3, 0.8, torch.device("cpu"))
    real, fake = torch.rand(4, 3, 32, 32), torch.full((4, 3, 32, 32), 0.5)
    losses = [float(adversary.step(real, fake, 1e-3)) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
    assert PatchDiscriminator()(torch.rand(1, 3, 64, 64)).shape == (1, 1, 6, 6)


def test_adversarial_term_is_balanced_against_the_reconstruction():
    torch.manual_seed(0)
    adversary = Adversary(3, 1e-3, 0.5, torch.device("cpu"))
    last = torch.nn.Conv2d(3, 3, 3, padding=1)
    images = last(torch.rand(2, 3, 32, 32))
    reconstruction = (images - 0.5).abs().mean()
    loss = adversary.generator_loss(images, reconstruction, last.weight)
    ours = torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(reconstruction, last.weight)[0].norm()
    assert float(ours / theirs) == pytest.approx(0.5, rel=0.05)


def vgg_state():
    """A VGG-16 state dict of torchvision's layout: its own indices and its classifier, random values."""
    torch.manual_seed(0)
    widths = {
        0: (3, 64),
        2: (64, 64),
        5: (64, 128),
        7: (128, 128),
        10: (128, 256),
        12: (256, 256),
        14: (256, 256),
        17: (256, 512),
    }
    widths.update({i: (512, 512) for i in (19, 21, 24, 26, 28)})
    state = {"classifier.0.bias": torch.zeros(3)}
    for index, (inputs, outputs) in widths.items():
        state["features.{}.weight".format(index)] = torch.randn(outputs, inputs, 3, 3) * (2.0 / (9 * inputs)) ** 0.5
        state["features.{}.bias".format(index)] = torch.zeros(outputs)
    return state


def test_perceptual_distance(tmp_path):
    state = vgg_state()
    torch.save(state, str(tmp_path / "vgg.pth"))
    model = load_perceptual([tmp_path / "vgg.pth"])
    image = torch.rand(1, 3, 32, 32)
    assert float(model(image, image)) == 0.0
    other = torch.rand(1, 3, 32, 32).requires_grad_()
    distance = model(other, image)
    distance.backward()
    assert float(distance.detach()) > 0 and float(other.grad.abs().sum()) > 0
    maps = model.maps(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    x = (image * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
        [0.458, 0.448, 0.450]
    ).view(1, 3, 1, 1)
    for index in (0, 2):
        x = torch.relu(torch.nn.functional.conv2d(x, state["features.{}.weight".format(index)], padding=1))
    assert torch.allclose(maps[0], torch.nn.functional.normalize(x, dim=1), atol=1e-5)
    linear = {"lin{}.model.1.weight".format(i): torch.zeros(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(linear, str(tmp_path / "lpips.pth"))
    assert float(load_perceptual([tmp_path / "vgg.pth", tmp_path / "lpips.pth"])(other.detach(), image)) == 0.0
    del state["features.28.weight"]
    torch.save(state, str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="features.28.weight"):
        load_perceptual([tmp_path / "vgg.pth"])
    assert isinstance(model, PerceptualDistance) and not any(p.requires_grad for p in model.parameters())


def test_held_out_images_are_never_trained_on(folder):
    train, held_out = train_vqgan.open_images(str(folder / "images"), 32, 5, 42)
    assert (train.count, held_out.count) == (22, 2)  # a tenth at most
    pictures = {fetch(torch.tensor([i])).numpy().tobytes() for count, fetch in (train, held_out) for i in range(count)}
    assert len(pictures) == 24
    again = train_vqgan.open_images(str(folder / "images"), 32, 5, 42)[1]
    assert torch.equal(again.fetch(torch.arange(2)), held_out.fetch(torch.arange(2)))
    stream = train_vqgan.batches(train, 11, torch.Generator().manual_seed(0))
    epoch = {image.numpy().tobytes() for _ in range(2) for image in next(stream)}
    assert len(epoch) == 22
    assert not epoch & {image.numpy().tobytes() for image in held_out.fetch(torch.arange(2))}


def test_figures():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0] = 0.1
    b[1] = 0.01
    assert train_vqgan.psnr(a, b) == pytest.approx(30.0, abs=1e-3)
    use = train_vqgan.code_use(torch.tensor([[0, 1], [0, 1]]), 4)
    assert use["codes_used"] == 0.5 and use["perplexity"] == pytest.approx(2.0)
    candidates = torch.rand(5, 3, 4, 4)
    candidates[4] = candidates[3]
    assert train_vqgan.retrieval(candidates + 0.01, torch.arange(5), candidates) == 1.0
    assert train_vqgan.retrieval(candidates[[1, 0]], torch.tensor([0, 1]), candidates) == 0.0
    assert train_vqgan.learning_rate(1.0, 1.0) == pytest.approx(0.0)
    assert train_vqgan.learning_rate(1.0, 0.03) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--steps or --minutes"),
        (["--steps", "1", "--minutes", "1"], "--steps or --minutes"),
        (["--steps", "0"], "--steps must be positive"),
        (["--steps", "1", "--ema-decay", "1"], "--ema-decay"),
        (["--steps", "1", "--continuous-start", "1"], "--continuous-start"),
        (["--steps", "1", "--vqgan_model_path", "w"], "--vqgan_config_path"),
    ],
)
def test_wrong_flags_are_named(folder, flags, words):
    with pytest.raises(UsageError, match=words):
        arguments(folder, *flags)


def test_wrong_inputs_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match="f8_demo"):
        train_vqgan.choose_config("f8_dem")
    with pytest.raises(UserError, match="not a folder"):
        train_vqgan.open_images(str(tmp_path / "absent"), 32, 5, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="fewer than two images"):
        train_vqgan.open_images(str(tmp_path / "empty"), 32, 5, 0)
    (tmp_path / "broken.png").write_bytes(b"no png")
    with pytest.raises(UserError, match="broken.png"):
        train_vqgan.read_image(tmp_path / "broken.png", 32)


def test_every_shipped_configuration_is_known():
    for name, config in train_vqgan.CONFIGS.items():
        assert train_vqgan.choose_config(name) == config


def test_shipped_demo_model():
    from data.demo import demo_images, demo_records

    model = load_vqgan(DEMO / "vqgan.safetensors", DEMO / "vqgan.yaml")
    assert (DEMO / "vqgan.safetensors").stat().st_size < 3_000_000
    assert model.image_size == 64
    pixels = demo_images(demo_records("heldout")[::10], 64).float() / 255.0
    reconstructions = model.decode(model.encode(pixels))
    assert train_vqgan.psnr(reconstructions, pixels) > 19.0
