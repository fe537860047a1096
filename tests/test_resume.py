"""--resume: options given anew take effect or are refused by name, and position and schedules count in samples."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from pathlib import Path
from unittest import mock

import poptorch_stand_in
import pytest
import torch
from helpers import ROOT, assert_same, flags, read_metrics, refused, run, train_here, weights_of
from ipu_helpers import Pairs, make_config, make_model
from PIL import Image

import args
import checkpoints
import engines
from checkpoints.vqgan import load_vqgan
from data import epoch_order
from engines.native import NativeEngine
from training import vqgan_options
from training.run import train
from training.schedule import Position, Schedule
from training.vqgan import save_weights
from utils.bad_steps import BadSteps
from utils.resume import APPLIES, CONTENT, FIXED, FREE

#: The run that is resumed: two steps of it are saved.
BASE = "--optimizer AdamW --lr-scheduler cosine --warmup-steps 1 --weight-decay 0.1 --validation-fraction 0 --epochs 1"
BASE = (*BASE.split(), "--max-bad-fraction", "0.5", "--max-steps", "2")

NEW_FOLDER, NEW_VQGAN, NEW_WORDS, NEW_LOGS = "other pairs", "other VQGAN", "other words", "other logs"  # see `Saved`

TWO_IPUS = {"ipus_per_replica": 2, "layers_per_ipu": [0, 3], "gradient_accumulation": 5}

#: What is given anew alone, and changes a step's results or is refused, or, where the option is free, does not.
_ALONE = dict(
    batch_size=1, gradient_accumulation=1, replication_factor=2, precision="bf16", random_seed=7,
    async_dataloader=False, executable_cache_dir="cache", profile_dir="profile", plan="show", optimizer="Adam",
    learning_rate=1e-05, lr_scheduler="ReduceLROnPlateau", warmup_steps=9, lr_floor=0.5, weight_decay=0.5, beta1=0.5,
    beta2=0.9, eps=0.01, clip_grad_norm=0.001, enable_half_first_order_momentum=True, ema_decay=0.9, hidden_size=32,
    num_hidden_layers=2, num_attention_heads=2, dim_head=4, text_seq_len=9, image_size=32, attn_types=["full"],
    attention_impl="explicit", ff_dropout=0.5, attn_dropout=0.5, sandwich_norm=True, norm="rms", qk_norm=True,
    rotary_2d=True, shift_tokens=True, value_residual=True, code_noise_similar=1.0, activation="swiglu", ff_mult=3,
    layer_scale=False, init_std=0.02, z_loss=0.1, label_smoothing=0.1, init_codes="codebook",
    loss_img_weight=1.0, soft_codes=0.5, code_noise=0.5, null_cond_prob=1.0,
    vqgan_model_path=NEW_VQGAN + ".safetensors", vqgan_config_path=NEW_VQGAN + ".yaml", input_folder=NEW_FOLDER,
    validation_folder=NEW_FOLDER,
    validation_fraction=0.2, bpe_path=NEW_WORDS, generated_data=True, synthetic_data=True, dataloader_workers=1,
    cache_codes="off", augment="flip", checkpoint_save_steps=1, keep_checkpoints=1, log_dir=NEW_LOGS, tensorboard=True,
    wandb=True, wandb_project_name="another", wandb_run_name="another", evaluate_every=1,
)
#: What is refused in itself.
_REFUSED = dict(
    shard=True, vae_path="vae", truncate_captions=False, shard_images="img", shard_captions="cap", max_bad_fraction=0.0,
    export_mindalle="exported",
)
_EVALUATED = dict(evaluate_captions=2, evaluate_images=2, inception_weights="file", clip_path="folder")
#: The same of options that an IPU engine alone looks at.
_IPU = dict(
    device_iterations=2, fp16=True, embedding_serialization_factor=2, matmul_proportion=[0.3], stochastic_rounding=True,
    enable_half_partials=True, optimizer_state_offchip=True, byteio=True,
)
#: For every option what is given anew, with how it shows where one step's results do not: the steps that are logged,
#: the text of an error, or a word for where `test_a_new_value_does_what_its_option_says` looks; then what else is set.
ANEW = {
    **{name: {name: value} for name, value in _ALONE.items()},
    **{name: ({name: value}, "ipu") for name, value in _IPU.items()},
    **{name: ({name: value}, args.flag_name(name)) for name, value in _REFUSED.items()},
    **{name: ({name: value}, args.flag_name(name) + " needs --evaluate-every") for name, value in _EVALUATED.items()},
    # Every run of these tests is resumed, in a copy of its folder.
    "checkpoint_output_dir": {}, "resume": {}, "device": ({"device": "cuda"}, "--device cuda"),
    "epochs": ({"epochs": 2, "max_steps": 0}, list(range(3, 13))), "max_steps": ({"max_steps": 4}, [3, 4]),
    "max_minutes": ({"max_minutes": 1e-9, "max_steps": 5}, [3]), "log_every": ({"log_every": 5, "max_steps": 4}, [4]),
    "matmul_precision": ({"matmul_precision": "medium"}, "engine"), "compile": ({"compile": True}, "compiled"),
    "activation_checkpointing": ({"activation_checkpointing": True}, "checkpointed"),
    "threads": ({"threads": 2}, "threads"), "ipus_per_replica": (TWO_IPUS, "ipu", {"gradient_accumulation": 5}),
    "layers_per_ipu": ({"layers_per_ipu": [1, 2]}, "ipu", TWO_IPUS), "cls_ipu_id": ({"cls_ipu_id": 0}, "ipu", TWO_IPUS),
    "embedding_ipu_id": ({"embedding_ipu_id": 1}, "ipu", TWO_IPUS),
    "enable_rts": ({"enable_rts": True}, "ipu", {"replication_factor": 2}),
    "compile_only": ({"compile_only": True}, "untouched"), "max_bad_steps": ({"max_bad_steps": 1}, "bad steps"),
    "loss_scaling": ({"loss_scaling": 128.0}, "scale"), "enable_als": ({"enable_als": True}, "ipu", {"fp16": True}),
    "architecture": {"architecture": "mindalle", "attn_types": ["full"], "dim_head": 16},
    "code_noise_per_image": {"code_noise": 0.3, "code_noise_per_image": True},
    "base_width": {"init_std": 0.02, "base_width": 32.0},
    "soft_codes_fade": {"soft_codes": 0.5, "soft_codes_fade": 1.0},
    "augment_share": {"augment": "flip", "augment_share": 0.9},
    "pretrained_checkpoint": ({"pretrained_checkpoint": "dalle.pt"}, "--resume and --pretrained-checkpoint"),
}


class Saved:
    """A run of which two steps are saved, and what any number of tests resume from there."""

    def __init__(self, folder, out):
        self.out, self.number = out, 0
        pairs = Path(shutil.copytree(folder / "pairs", out / "pairs"))
        (pairs / "long.txt").write_text("far more words than eight tokens have room for, whatever they are\n")
        shutil.copy(pairs / "000.png", pairs / "long.png")
        (pairs / "bad.txt").write_text("")
        shutil.copy(pairs / "000.png", pairs / "bad.png")
        for path in Path(shutil.copytree(folder / "pairs", out / NEW_FOLDER)).glob("*.png"):
            Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
        torch.manual_seed(5)
        vqgan = load_vqgan(folder / "vqgan.safetensors", folder / "vqgan.yaml")
        vqgan.quantize.codebook.data.normal_()
        save_weights(out, vqgan, half=False)
        (out / "vqgan.safetensors").rename(out / (NEW_VQGAN + ".safetensors"))
        yaml = (folder / "vqgan.yaml").read_text()
        assert "resolution: 16" in yaml
        (out / (NEW_VQGAN + ".yaml")).write_text(yaml.replace("resolution: 16", "resolution: 32"))
        words = (ROOT / "bpe" / "bpe_yttm_vocab.txt").read_text().splitlines()
        words[1], words[2] = words[2], words[1]
        (out / NEW_WORDS).write_text("\n".join(words) + "\n")
        more = ("--input-folder", str(pairs), "--truncate-captions", "--cache-codes", str(out / "codes"))
        self.config = args.parse(flags(folder, out / "first", *BASE, *more))
        self.train(self.config)
        self.expected = self.resume()[0]  # where nothing is given anew

    def train(self, config):
        with contextlib.closing(engines.create(config)) as engine:
            train(config, engine)
        return engine

    def resume(self, **anew):
        """Take the third step, with some options given anew; returns (what came of it, the engine)."""
        self.number += 1
        out = self.out / str(self.number)
        shutil.copytree(self.out / "first", out)
        anew = {key: str(self.out / value) if str(value).startswith("other ") else value for key, value in anew.items()}
        anew.setdefault("log_dir", str(out))
        options = {"checkpoint_output_dir": str(out / "ckpt"), "resume": True, "max_steps": 3, **anew}
        engine = self.train(self.config.replace(**options))
        newest = checkpoints.read_dalle(checkpoints.newest_checkpoint(out / "ckpt"))
        events = [event for event in read_metrics(Path(options["log_dir"])) if event["step"] > 2]
        kept = [{k: v for k, v in event.items() if k not in ("time", "samples_per_second")} for event in events]
        return {"events": kept, "weights": digest(newest.weights), "ema": digest(newest.ema or {})}, engine


def digest(tensors):
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    return Saved(folder, tmp_path_factory.mktemp("resume"))


def test_every_option_has_a_verdict_and_a_test():
    """Found in the command: a flag that is new in args.py needs both."""
    assert args.COMMAND.specs.keys() - {"config", "config_file"} == ANEW.keys()  # those two choose values of others
    rules = args.resume_rules()
    assert rules.keys() == ANEW.keys() and set(rules.values()) == {APPLIES, FIXED, CONTENT, FREE}
    assert set(vqgan_options.AT_RESUME.values()) == {APPLIES, FIXED, CONTENT, FREE}


@pytest.mark.parametrize("name", ANEW)
def test_a_new_value_does_what_its_option_says(saved, name, monkeypatch):
    anew, seen, *more = ANEW[name] if isinstance(ANEW[name], tuple) else (ANEW[name], None)
    rule, flag = args.resume_rules()[name], args.flag_name(name)
    if seen == "ipu":
        assert rule == APPLIES
        check_ipu(monkeypatch, anew, *more)
    elif seen == "scale":
        assert rule == APPLIES
        check_loss_scale(saved, monkeypatch)
    elif isinstance(seen, str) and seen.startswith("--"):
        refused(seen, saved.resume, **anew)
    elif rule in (FIXED, CONTENT):
        refused("^--resume: .*dalle_0_2.pt .* " + flag, saved.resume, **anew)
    else:
        notes = take_notes(monkeypatch)
        found, engine = saved.resume(**anew)
        if isinstance(seen, list):
            assert [event["step"] for event in found["events"]] == seen
        elif seen == "untouched":
            assert not found["events"]
        elif seen is None:
            assert (found == saved.expected) == (rule == FREE)
        else:
            notes["engine"] = ["matmuls of medium precision" in engine.describe()]
            notes["checkpointed"] = [hasattr(engine.model.dalle.transformer.layers[0].forward, "func")]
            assert notes[seen] == [{"threads": 2, "bad steps": 1}.get(seen, True)]


def take_notes(monkeypatch):
    """Note what one step's results do not show, and keep away what is not ours: TensorBoard and Weights & Biases."""
    notes = {"threads": [], "compiled": [], "bad steps": []}

    def bad_steps(limit, *more, made=BadSteps):
        notes["bad steps"].append(limit)
        return made(limit, *more)

    monkeypatch.setattr("training.run.BadSteps", bad_steps)
    monkeypatch.setattr(torch, "set_num_threads", notes["threads"].append)
    monkeypatch.setattr(torch, "compile", lambda module: notes["compiled"].append(True) or module)
    for name in ("_TensorBoard", "_Wandb"):
        monkeypatch.setattr(f"utils.metrics.{name}", mock.Mock())
    return notes


def check_loss_scale(saved, monkeypatch):
    """A new first factor replaces the scale that half precision had come to, an unchanged one does not."""
    scaler = functools.partial(torch.amp.GradScaler, "cpu")
    monkeypatch.setattr("engines.native.make_scaler", lambda _, given: scaler(init_scale=given["init_scale"]))

    def engine(**anew):
        made = engines.create(saved.config.replace(**anew))
        made.prepare(make_model())
        return made

    state = engine().state_dict()
    state["scaler"]["scale"] = 512.0
    for anew, scale in (({}, 512.0), ({"loss_scaling": 128.0}, 128.0)):
        resumed = engine(**anew)
        resumed.load_state_dict(state)
        assert resumed.scaler.get_scale() == scale


def check_ipu(monkeypatch, anew, base=None):
    """What an IPU engine that takes over a state hands to PopTorch is another thing with the new options."""
    poptorch_stand_in.install(monkeypatch)
    state = {}

    def handed(**options):
        config = make_config(1).replace(**options)
        engine = engines.create(config)
        engine.prepare(make_model(), Pairs(4 * config.global_batch))
        if state:
            engine.load_state_dict(state)
        state.update(engine.state_dict())
        group = {key: value for key, value in engine.optimizer.param_groups[0].items() if key != "params"}
        own = [engine.plan, engine.half, engine.image_dtype, engine.iterations, engine.optimizer.loss_scaling, group]
        engine.close()
        return plain(engine.options), repr(own), repr(engine.model)

    first = handed(**(base or {}))
    assert handed(**(base or {})) == first != handed(**{**(base or {}), **anew})


def plain(value):
    """Options of the stand-in as text and tables, which compare by what they hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != "_owner"}
    return plain(vars(value)) if type(value).__module__ == poptorch_stand_in.__name__ else repr(value)


def taken(monkeypatch):
    """A list that grows by the numbers of the samples of each epoch that is read, in the order of training."""
    found, batches = [], NativeEngine._batches

    def noted(self, dataset, numbers):
        numbers = list(numbers)
        found.append(sum(numbers, []))
        return batches(self, dataset, numbers)

    monkeypatch.setattr(NativeEngine, "_batches", noted)
    return found


def rates(out):
    return {event["step"]: event["learning_rate"] for event in read_metrics(out, "train")}


def batch(size, accumulation):
    return f"--batch-size {size} --gradient-accumulation {accumulation} --validation-fraction 0".split()


@pytest.mark.parametrize("first, stop, then, skipped", [
    ((1, 1), 10, (4, 1), 2),  # samples 10, 14 and 18 of 24 begin a step; the last two fill none
    ((4, 1), 3, (1, 2), 0), ((2, 2), 3, (2, 3), 0),
    ((1, 1), 22, (2, 2), 2),  # nothing is left of the epoch but its end
    ((4, 2), 3, (3, 1), 0),  # between two epochs
])
def test_another_batch_goes_on_at_the_right_sample(folder, tmp_path, monkeypatch, first, stop, then, skipped):
    """No sample is skipped or repeated but what fills no batch, --epochs are as many, and rates are those of a run that
    had the later batch from its start, at the same sample."""
    schedule = ("--lr-scheduler", "cosine", "--warmup-steps", "3", "--epochs", "3")
    size, later = first[0] * first[1], then[0] * then[1]
    seen = taken(monkeypatch)
    run(folder, tmp_path, *batch(*first), *schedule, "--max-steps", str(stop))
    run(folder, tmp_path, *batch(*then), *schedule, "--max-steps", "0", "--resume")
    newest = checkpoints.newest_checkpoint(tmp_path / "ckpt")
    position = checkpoints.read_dalle(newest).training["position"]
    assert newest.name == "dalle_2.pt" and (tmp_path / "ckpt/dalle_0.pt").exists()
    samples = sum(seen, [])
    epochs = [epoch_order(24, 42, epoch).tolist() for epoch in range(3)]
    epochs[stop * size // 24] = epochs[stop * size // 24][: 24 - skipped]
    assert samples == sum(epochs, [])
    steps = stop + (3 * 24 - skipped - stop * size) // later
    assert (position["epoch"], position["sample_in_epoch"]) == (3, 0)
    assert (position["step"], position["samples"]) == (steps, 3 * 24 - skipped)
    found = rates(tmp_path)
    assert sorted(found) == list(range(1, steps + 1))
    whole = Schedule(args.parse(flags(folder, tmp_path, *batch(*then), *schedule)), 24)
    for step in range(stop, steps):
        done = stop * size + (step - stop) * later
        # The end of the cosine is where the samples end, of which some may have been skipped.
        at = Position(epoch=done // 24, sample_in_epoch=done % 24, samples=done)
        assert found[step + 1] == pytest.approx(whole.learning_rate(at), rel=0.1 if skipped else 1e-12)


def test_what_fills_no_batch_is_told(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run(folder, tmp_path, *batch(1, 1), "--max-steps", "22")
    run(folder, tmp_path, *batch(2, 2), "--max-steps", "0", "--epochs", "1", "--resume")
    assert "dalle_0_22.pt: epoch 0, step 22, sample 22 of 24" in caplog.text
    assert "options: --batch-size 2 instead of 1, --gradient-accumulation 2 instead of 1, --epochs 1" in caplog.text
    assert "epoch 0: its last 2 sample(s) do not fill a batch of 4 and are skipped" in caplog.text
    assert (tmp_path / "ckpt/dalle_0.pt").exists()  # the epoch has its end


@pytest.mark.parametrize("name", ["dalle_0_2.pt", "dalle_1_8.pt"])
def test_checkpoints_of_older_versions_are_resumed_with_the_same_bits(folder, tmp_path, name):
    more = ("--lr-scheduler", "cosine", "--warmup-steps", "3", "--checkpoint-save-steps", "2")
    run(folder, tmp_path / "whole", *more)
    content = torch.load(tmp_path / "whole/ckpt" / name, weights_only=True)
    training = content["training"]
    position = training["position"]
    del position["samples"], training["engine"]["loss_scaling"], training["vqgan"]["options"]
    position["step_in_epoch"] = position.pop("sample_in_epoch") // 4
    del training["config"]["augment"]  # an option that there was not
    training["config"]["forgotten"] = 1  # and one that there is no more
    (tmp_path / "parts/ckpt").mkdir(parents=True)
    torch.save(content, tmp_path / "parts/ckpt" / name)
    run(folder, tmp_path / "parts", "--resume", *more)
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "constant", "multi_step", "cosine"])
def test_a_new_rate_takes_effect_with_every_schedule(name):
    """Whatever the schedule was at: with a plateau, also after reductions, it is the rate from now on."""
    config = args.Config().replace(lr_scheduler=name, learning_rate=1e-3, epochs=20, batch_size=4)
    position = Position(epoch=15, sample_in_epoch=8, step=92, samples=368)
    first, lower, same = (Schedule(config.replace(learning_rate=rate), 24) for rate in (1e-3, 1e-5, 1e-3))
    for _ in range(15):
        first.end_epoch(2.0)
    before = first.learning_rate(position)
    for schedule in (lower, same):
        schedule.load_state_dict(first.state_dict())
    lower.plateau.restart(1e-5)
    assert same.learning_rate(position) == before
    assert lower.learning_rate(position) == (1e-5 if name == "ReduceLROnPlateau" else pytest.approx(before / 100))
    for expected in [1e-5] * 10 + [5e-6] if name == "ReduceLROnPlateau" else []:
        lower.end_epoch(2.0)  # the best loss is remembered, the patience is new
        assert lower.learning_rate(position) == expected


def test_the_advice_after_bad_steps_works(folder, tmp_path):
    """A lower --learning-rate, by flag or in a changed YAML file, with the schedule of the published configurations."""
    text = "a: {{learning_rate: {}, hidden_size: {}, lr_scheduler: ReduceLROnPlateau, truncate_captions: true"
    text += f", bpe_path: {ROOT / 'bpe' / 'bpe_yttm_vocab.txt'}}}}}"
    file = tmp_path / "mine.yaml"
    words = flags(folder, tmp_path, "--num-hidden-layers", "1", "--config-file", file, "--config", "a")
    at = words.index("--hidden-size")
    words[at : at + 2] = []

    def go(rate, steps, *more, width=16):
        file.write_text(text.format(rate, width))
        train_here([*words, "--max-steps", steps, *more])
        return list(rates(tmp_path).values())

    assert go(3.0e-4, "1") == [3e-4] and go(3.0e-4, "2", "--resume", "--learning-rate", "1e-5") == [3e-4, 1e-5]
    assert go(1.0e-5, "3", "--resume") == [3e-4, 1e-5, 1e-5]  # the same, in the file
    assert go(2.0e-6, "4", "--resume") == [3e-4, 1e-5, 1e-5, 2e-6]
    complaint = "dalle_0_4.pt was written with --hidden-size 16, not 32; .* --checkpoint-out"
    refused(complaint, go, 2.0e-6, "5", "--resume", width=32)


def test_files_may_lie_elsewhere(saved, folder, tmp_path):
    files = {
        "vqgan_model_path": folder / "vqgan.safetensors", "vqgan_config_path": folder / "vqgan.yaml",
        "bpe_path": ROOT / "bpe" / "bpe_yttm_vocab.txt",
    }
    moved = {name: str(shutil.copy(path, tmp_path / ("moved " + path.name))) for name, path in files.items()}
    assert saved.resume(**moved)[0] == saved.expected


def test_a_model_that_decided_on_its_shape_goes_on(folder, tmp_path, caplog):
    """--pretrained-checkpoint had another shape than the configuration: neither is given anew when it is resumed, and
    nor is a default that is spelled out."""
    run(folder, tmp_path / "first", "--max-steps", "1")
    start = ("--pretrained-checkpoint", str(tmp_path / "first/ckpt/dalle_0_1.pt"))
    run(folder, tmp_path / "tuned", "--max-steps", "1", "--hidden-size", "32", *start)
    assert "not of the configuration: --hidden-size 16 instead of 32" in caplog.text
    for step, width, more in (("2", "32", []), ("3", "16", ["--activation", "geglu"]), ("4", "16", [])):
        run(folder, tmp_path / "tuned", "--max-steps", step, "--hidden-size", width, "--resume", *more)
    refused("--hidden-size", run, folder, tmp_path / "tuned", "--max-steps", "5", "--hidden-size", "8", "--resume")


def test_a_resumed_run_keeps_its_number_of_threads(folder, tmp_path, threads):
    """Some of PyTorch's sums depend on it."""
    run(folder, tmp_path, "--max-steps", "1", "--threads", "2")
    for steps, more, expected in (("2", (), 2), ("3", ("--threads", "3"), 3), ("4", (), 3)):
        threads(1)
        run(folder, tmp_path, "--max-steps", steps, "--resume", *more)
        assert torch.get_num_threads() == expected
