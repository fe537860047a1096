"""FID, KID, IS, precision and recall against torch-fidelity 0.4.0; CLIP score, reconstruction and memorization."""
from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT, random_images, refused
from PIL import Image

import evaluate
from dalle import measuring
from dalle.clip_score import ClipCollector
from metrics import distances, memorization
from metrics.features import Collector, Features, features_of
from metrics.images import ImageSet, folder_images
from metrics.inception import load_inception
from metrics.reconstruction import ssim

STUBS = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".datasets",
         ".models", ".io")  # fmt: skip


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity with torchvision, which has no build for this PyTorch, replaced by empty modules."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("run_tests.sh installs torch-fidelity")
    before = dict(sys.modules)
    for name in STUBS:
        module = MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec("torchvision" + name, None)
        sys.modules["torchvision" + name] = module
    yield importlib.import_module("torch_fidelity")
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def test_features_of_images(fidelity, inception_weights):
    """Sizes below and above the network's, and odd ones."""
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    peer = module.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], str(inception_weights))
    network = load_inception(inception_weights)
    for shape in ((2, 3, 40, 40), (1, 3, 330, 301), (1, 3, 1, 7)):
        images = random_images(shape[0], shape[2:], 1)
        for ours, theirs in zip(network(images), peer(images)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.slow  # the peer's FID alone takes half a minute
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_all_figures_of_images(fidelity, inception_weights):
    sets = [random_images(24, 40, 1), torch.flip(random_images(20, 56, 2), dims=[1]) // 2]
    network = load_inception(inception_weights)
    generated, real = (features_of(ImageSet("", len(images), None, images.__getitem__), network, 8) for images in sets)
    listed = [torch.utils.data.Subset(images, range(len(images))) for images in sets]
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(inception_weights)}
    options.update(dict.fromkeys(("isc", "fid", "kid", "prc"), True), batch_size=8, kid_subset_size=20)
    options.update(dict.fromkeys(("cuda", "cache", "verbose"), False))
    wanted = fidelity.calculate_metrics(input1=listed[0], input2=listed[1], **options)
    found = distances.distances(distances.METRICS, generated, real)
    assert found["is"] > 2 and found["fid"] > 1
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean", "is": "inception_score_mean"}
    names.update(is_deviation="inception_score_std", precision="precision", recall="recall")
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(wanted[theirs], rel=1e-3, abs=1e-6), ours


def check_fid(x, y, tolerance):
    metric_fid = importlib.import_module("torch_fidelity.metric_fid")
    statistics = [metric_fid.fid_features_to_statistics(features) for features in (x, y)]
    wanted = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert distances.fid(x, distances.Moments(y)) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("n, m, width", [(90, 70, 32), (20, 70, 32), (20, 25, 32)])
def test_distances_of_features(fidelity, n, m, width):
    """More and fewer images than features, on either side."""
    metric_kid, metric_prc = (importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("kid", "prc"))
    torch.manual_seed(n)
    x, y = torch.randn(n, width) @ torch.randn(width, width) / 4 + 0.5, torch.randn(m, width).abs()
    check_fid(x, y, 1e-5)
    wanted = metric_kid.kid_features_to_metric(x, y, kid_subset_size=min(n, m), verbose=False)
    assert distances.kid(x, y) == pytest.approx(tuple(wanted.values()), rel=1e-4)
    wanted = metric_prc.prc_features_to_metric(x, y, verbose=False)
    assert distances.precision_recall(x, y) == pytest.approx(tuple(wanted.values())[:2], abs=1e-6)


@pytest.mark.slow
def test_more_images_than_inception_features(fidelity):
    torch.manual_seed(0)
    mix = torch.randn(2048, 2048) / 45
    x, y = (torch.randn(2200, 2048) @ mix + shift for shift in (0.0, 0.1))
    check_fid(x, y, 1e-3)


def test_fid_of_infinitely_many_images():
    """FID of two samples of one distribution is all bias: the extrapolation takes most of it away."""
    torch.manual_seed(0)
    found = distances.fid_with_uncertainty(torch.randn(600, 16), distances.Moments(torch.randn(20000, 16)))
    assert abs(found["fid_infinity"]) < found["fid"] / 2 and 0 < found["fid_subset_deviation"] < found["fid"]


@pytest.mark.parametrize("metric, message", [("fid", "2 images"), ("kid", "2 images"), ("prc", "more than 3")])
def test_too_few_images(metric, message):
    one = Features(torch.zeros(1, 4), torch.zeros(1, 4))
    refused(f"--metrics: .*{message}", distances.distances, [metric], one, one)


@pytest.fixture
def folder(tmp_path):
    """Images of two sizes as generate.py leaves them, with a grid that does not count."""
    for number, size in enumerate([(20, 20), (20, 20), (30, 24), (20, 20)]):
        (tmp_path / "red").mkdir(exist_ok=True)
        Image.new("RGB", size, (number * 40, 0, 0)).save(tmp_path / "red" / f"{number}.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "red" / "grid.png")
    return tmp_path


def test_images_of_a_folder_and_too_few_of_them(folder):
    found = folder_images("--images", str(folder), ignored="grid.png")
    assert found.num_images == 4
    assert [tuple(batch.shape) for batch in found.batches(8)] == [(2, 3, 20, 20), (1, 3, 24, 30), (1, 3, 20, 20)]
    square = folder_images("--images", str(folder), 16, "grid.png")
    assert [tuple(batch.shape) for batch in square.batches(3)] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert square.identity != found.identity
    (folder / "red" / "2.png").write_bytes(b"no image")
    refused("--images .*2.png cannot be read", list, found.batches(8))
    for path, message in ((folder / "none", "no such folder"), (folder / "red" / "0.png", "neither a folder nor")):
        refused(f"--images .*: {message}", folder_images, "--images", str(path))
    words = f"--images {folder} --metrics is --inception-weights none.pth"
    refused("--metrics is needs at least 10 images: .* has 4", evaluate.main, words.split())


def test_features_are_cached(folder, inception_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network, images = load_inception(inception_weights), folder_images("--images", str(folder))
    first = features_of(images, network, 4)
    monkeypatch.setattr(type(network), "forward", None)
    again = features_of(images, network, 4)
    assert torch.equal(again.pooled, first.pooled) and torch.equal(again.logits, first.logits)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(b"damaged")
    refused("", features_of, images, network, 4, kind=TypeError)  # measured again


def test_other_networks_and_features_that_are_not_finite_are_refused():
    file = ROOT / "models" / "demo" / "dalle.safetensors"
    refused("--inception-weights .*: not torch-fidelity's Inception network", load_inception, file)
    collector = Collector(lambda images: (images.float(), images / 0.0))
    refused("--inception-weights: this network's features are not finite", collector.add, random_images(1, 8, 0))


def test_ssim():
    """Its definition at one window, and its ends."""
    images = random_images(2, 11, 5)
    noisy = (images.float() + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 20).clamp(0, 255)
    noisy = noisy.to(torch.uint8)
    weights = torch.exp(-(torch.arange(-5.0, 6.0).double() ** 2) / 4.5)
    weights, expected = (weights[:, None] * weights) / weights.sum() ** 2, []
    for x, y in zip(images.double(), noisy.double()):
        channels = []
        for a, b in zip(x, y):
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            c1, c2 = 2.55**2, 7.65**2
            channels.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        expected.append(torch.stack(channels).mean())
    assert torch.allclose(ssim(images, noisy), torch.stack(expected))
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_nearest_training_images():
    training = random_images(30, 32, 1)
    generated = training[[7, 29]].clone()
    generated[1, :, :4] = 0
    found = memorization.nearest(generated, training.split(8))
    assert found.numbers.tolist() == [7, 29] and torch.equal(found.images, training[[7, 29]])
    assert found.distance[0] < 1e-3 < found.distance[1]


def evaluated(tmp_path, *words):
    evaluate.main([*words, "--device", "cpu", "--json", str(tmp_path / "result.json")])
    return json.loads((tmp_path / "result.json").read_text())


def test_a_folder_and_a_tokenizer_are_measured(folder, inception_weights, tmp_path, capsys):
    given = ("--inception-weights", str(inception_weights), "--metrics", "fid,kid,prc")
    result = evaluated(tmp_path, "--images", str(folder), "--reference", str(folder), *given)
    (found,) = result["metrics"]
    assert abs(found["fid"]) < 1e-3 and found["precision"] == found["recall"] == 1
    assert result["protocol"]["num_images"] == 4 and len(result["protocol"]["inception"]) == 64
    assert "note: 4 images" in capsys.readouterr().out
    words = ("--reconstruction", "--dalle-path", "demo", "--input-folder", str(folder), "--metrics", "fid")
    result = evaluated(tmp_path, *words, "--inception-weights", str(inception_weights))
    (found,) = result["metrics"]
    assert len(result["protocol"]["inception"]) == 64
    assert found["psnr"] > 10 and 0 < found["ssim"] < 1 and found["rfid"] > 0 and 1 < found["perplexity"] <= 512


def test_a_model_is_measured_at_each_guidance_scale(inception_weights, tmp_path, capsys, caplog, monkeypatch):
    """Other captions get other random numbers; a second run gives the same figures. What is real is measured once."""
    made, moments = [], distances.Moments.__init__
    monkeypatch.setattr(distances.Moments, "__init__", lambda *given: (made.append(given), moments(*given))[1])
    words = ("--dalle-path", "demo", "--metrics", "loss,fid,copies", "--num-images", "3", "--max-pairs", "2")
    words += ("--cond-scale", "1", "2", "--inception-weights", str(inception_weights))
    first, second = evaluated(tmp_path, *words), evaluated(tmp_path, *words)
    assert [len(features) for _, features in made] == [2, 3, 3] * 2
    assert caplog.text.count("features of demo: those of an earlier run") == 1
    assert first["metrics"] == second["metrics"] and [row["cond_scale"] for row in first["metrics"]] == [1, 2]
    assert first["metrics"][0]["fid"] != first["metrics"][1]["fid"] and first["validation"]["loss"] > 0
    assert first["protocol"]["temperature"] == 1 and first["protocol"]["num_real"] == 2
    assert all((tmp_path / f"result.copies-{scale}.png").is_file() for scale in (1, 2))
    assert capsys.readouterr().out.count("guidance") == 2


class Clip:
    """A stand-in for CLIP: redness is all that images and captions have."""

    def __init__(self, *_):
        pass

    def embed_images(self, images):
        red = torch.tensor([image.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images])
        return torch.stack([red, (1 - red**2).sqrt()], dim=1)

    def embed_texts(self, captions):
        return torch.tensor([[float(text.count("red")), 0.0] for text in captions])


def test_clip_score_and_retrieval(tmp_path):
    found = ClipCollector(Clip())
    red, grey = (torch.full((1, 3, 4, 4), value, dtype=torch.uint8) for value in (255, 51))
    found.add(torch.cat([red, grey, grey]), ["red", "red red", "grey"])
    assert found.result() == pytest.approx({"clip": 100 * (1 + 0.4 + 0) / 3, "clip_retrieval": 1 / 3})


def test_guidance_is_plotted(tmp_path):
    rows = [{"cond_scale": scale, "fid": 20 / scale, "clip": 20 + scale} for scale in (1.0, 3.0)]
    measuring.plot_sweep({"metrics": rows, "protocol": {"num_images": 5}}, str(tmp_path / "sweep.png"))
    assert Image.open(tmp_path / "sweep.png").size == (900, 675)


WRONG = [
    ("", "missing --dalle-path"), ("--images x --metrics fid", "--metrics fid needs --reference"),
    ("--images x", "--images: give --metrics of fid, kid, is, prc"),
    ("--images x --metrics is,clip --clip-path y", "not clip"),
    ("--images x --reconstruction --metrics is", "--images and --reconstruction exclude each other"),
    ("--images x --dalle-path demo --metrics is", "--dalle-path has no use with --images"),
    ("--images x --metrics is --reference y", "--reference has no use with --metrics is"),
    ("--images x --metrics is --input-folder y", "--input-folder has no use with --images"),
    ("--images x --metrics is --sheet y.png", "--sheet has no use with --images"),
    ("--images x --metrics is --seed 1", "--seed has no use with --images"),
    ("--reconstruction --dalle-path demo --max-pairs 3", "--max-pairs has no use with --reconstruction"),
    ("--reconstruction --dalle-path demo --split all", "--split has no use with --reconstruction"),
    ("--dalle-path demo --inception-weights x", "--inception-weights is for --metrics of fid, kid, is, prc"),
    ("--dalle-path demo --metrics fid --best-of 2", "--best-of is for retrieval and --sheet"),
    ("--dalle-path demo --skip-retrieval --parallel off", "--parallel: images are only sampled for retrieval"),
    ("--dalle-path demo --reference x", "--reference needs --images"),
    ("--dalle-path demo --image-size 32", "--image-size needs --images"),
    ("--reconstruction", "--reconstruction needs --vqgan-model-path"),
    ("--reconstruction --dalle-path demo --metrics is", "fid and kid"),
    ("--dalle-path demo --metrics clip", "--metrics clip and --clip-path belong together"),
    ("--dalle-path demo --cond-scale 1 2", "--cond-scale: several scales"),
    ("--dalle-path demo --metrics fid --cond-scale 1 1", "--cond-scale: each scale is given once"),
    ("--dalle-path demo --plot x.png", "--plot needs --metrics fid clip"),
    ("--dalle-path demo --num-images 5", "--num-images needs --metrics"),
    ("--dalle-path x --metrics fid prc --num-images 3", "prc needs at least 4 images: --num-images is 3"),
    ("--dalle-path x --metrics is --num-images 9", "is needs at least 10 images: --num-images is 9"),
    ("--dalle-path demo --resume", "--resume needs --json"),
    ("--reconstruction --dalle-path demo --resume --json x", "--resume has no use with --reconstruction"),
    ("--dalle-path demo --perceptual-weights x", "--perceptual-weights needs --reconstruction"),
    ("--dalle-path demo --metrics bleu", "--metrics: expected one of loss, fid"),
]


@pytest.mark.parametrize("words, message", WRONG)
def test_options_that_contradict_each_other(words, message):
    refused(message, evaluate.main, words.split())
