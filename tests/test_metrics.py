"""FID, KID, IS, precision and recall against torch-fidelity 0.4.0; CLIP score, reconstruction and memorization."""
from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT
from PIL import Image

from metrics import distances, memorization
from metrics.features import Features, features_of
from metrics.images import ImageSet, folder_images
from metrics.inception import Inception, load_inception
from metrics.reconstruction import ssim
from utils.errors import UserError

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


def random_images(count: int, size: int, seed: int) -> torch.Tensor:
    """Smooth random images of different contrast, uint8 (n, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return (torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in torch-fidelity's layout: random weights whose norms fit data, and a head that tells images apart."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    _, logits = network(random_images(8, 64, 3))
    network.fc.weight.data *= 40 / logits.std()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), str(path))
    return path


def test_features_of_images(fidelity, weights):
    """Sizes below and above the network's, and odd ones."""
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    peer = module.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], str(weights))
    network = load_inception(weights)
    for shape in ((2, 3, 40, 40), (1, 3, 330, 301), (1, 3, 1, 7)):
        images = random_images(shape[0], shape[2:], 1)
        for ours, theirs in zip(network(images), peer(images)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.slow  # the peer's FID alone takes half a minute
@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_all_figures_of_images(fidelity, weights):
    sets = [random_images(24, 40, 1), torch.flip(random_images(20, 56, 2), dims=[1]) // 2]
    network = load_inception(weights)
    generated, real = (
        features_of(ImageSet("", len(images), None, lambda size, own=images: iter(own.split(size))), network, 8)
        for images in sets
    )
    options = dict(feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), cuda=False)
    options.update(cache=False, verbose=False, batch_size=8, kid_subset_size=20)
    options.update(isc=True, fid=True, kid=True, prc=True)
    wanted = fidelity.calculate_metrics(input1=list_dataset(sets[0]), input2=list_dataset(sets[1]), **options)
    found = distances.distances(distances.METRICS, generated, real)
    assert found["is"] > 2 and found["fid"] > 1
    for ours, theirs in (
        ("fid", "frechet_inception_distance"),
        ("kid", "kernel_inception_distance_mean"),
        ("is", "inception_score_mean"),
        ("is_deviation", "inception_score_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert found[ours] == pytest.approx(wanted[theirs], rel=1e-3, abs=1e-6), ours


def list_dataset(images):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index]

    return Images()


@pytest.mark.parametrize("n, m, width", [(90, 70, 32), (20, 70, 32), (20, 25, 32)])
def test_distances_of_features(fidelity, n, m, width):
    """More and fewer images than features, on either side."""
    metric_fid, metric_kid, metric_prc = (
        importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc")
    )
    torch.manual_seed(n)
    x, y = torch.randn(n, width) @ torch.randn(width, width) / 4 + 0.5, torch.randn(m, width).abs()
    statistics = [metric_fid.fid_features_to_statistics(features) for features in (x, y)]
    wanted = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert distances.fid(x, distances.Moments(y)) == pytest.approx(wanted, rel=1e-5)
    size = min(n, m)
    wanted = metric_kid.kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)
    found = distances.kid(x, y)
    assert found == pytest.approx(tuple(wanted.values()), rel=1e-4)
    wanted = metric_prc.prc_features_to_metric(x, y, verbose=False)
    assert distances.precision_recall(x, y) == pytest.approx(tuple(wanted.values())[:2], abs=1e-6)


@pytest.mark.slow
def test_more_images_than_inception_features(fidelity):
    metric_fid = importlib.import_module("torch_fidelity.metric_fid")
    torch.manual_seed(0)
    mix = torch.randn(2048, 2048) / 45
    x, y = (torch.randn(2200, 2048) @ mix + shift for shift in (0.0, 0.1))
    statistics = [metric_fid.fid_features_to_statistics(features) for features in (x, y)]
    wanted = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert distances.fid(x, distances.Moments(y)) == pytest.approx(wanted, rel=1e-3)


def test_fid_of_infinitely_many_images():
    """FID of two samples of one distribution is all bias: the extrapolation takes most of it away."""
    torch.manual_seed(0)
    found = distances.fid_with_uncertainty(torch.randn(600, 16), distances.Moments(torch.randn(20000, 16)))
    assert abs(found["fid_infinity"]) < found["fid"] / 2 and 0 < found["fid_subset_deviation"] < found["fid"]


@pytest.mark.parametrize("metric, message", [("fid", "2 images"), ("kid", "2 images"), ("prc", "more than 3")])
def test_too_few_images(metric, message):
    one = Features(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(UserError, match=f"--metrics: .*{message}"):
        distances.distances([metric], one, one)


# Sets of images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Images of two sizes as generate.py leaves them, with a grid that does not count."""
    for number, size in enumerate([(20, 20), (20, 20), (30, 24), (20, 20)]):
        (tmp_path / "red").mkdir(exist_ok=True)
        Image.new("RGB", size, (number * 40, 0, 0)).save(tmp_path / "red" / f"{number}.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "red" / "grid.png")
    return tmp_path


def test_images_of_a_folder(folder):
    found = folder_images("--images", str(folder), ignored="grid.png")
    assert found.num_images == 4
    assert [tuple(batch.shape) for batch in found.batches(8)] == [(2, 3, 20, 20), (1, 3, 24, 30), (1, 3, 20, 20)]
    square = folder_images("--images", str(folder), 16, "grid.png")
    assert [tuple(batch.shape) for batch in square.batches(3)] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert square.identity != found.identity
    (folder / "red" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="--images .*2.png cannot be read"):
        list(found.batches(8))
    for path, message in ((folder / "none", "no such folder"), (folder / "red" / "0.png", "no such folder")):
        with pytest.raises(UserError, match=f"--images .*: {message}"):
            folder_images("--images", str(path))


def test_features_are_cached(folder, weights, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network, images = load_inception(weights), folder_images("--images", str(folder))
    first = features_of(images, network, 4)
    monkeypatch.setattr(type(network), "forward", None)
    again = features_of(images, network, 4)
    assert torch.equal(again.pooled, first.pooled) and torch.equal(again.logits, first.logits)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(TypeError):  # measured again
        features_of(images, network, 4)


def test_another_file_is_no_inception_network():
    with pytest.raises(UserError, match="--inception-weights .*: not torch-fidelity's Inception network"):
        load_inception(ROOT / "models" / "demo" / "dalle.safetensors")


# Others ---------------------------------------------------------------------------------------------------------------


def test_ssim():
    """Its definition at one window, and its ends."""
    images = random_images(2, 11, 5)
    noisy = (images.float() + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 20).clamp(0, 255)
    noisy = noisy.to(torch.uint8)
    weights = torch.exp(-(torch.arange(-5.0, 6.0).double() ** 2) / 4.5)
    weights = (weights[:, None] * weights) / weights.sum() ** 2
    expected = []
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
