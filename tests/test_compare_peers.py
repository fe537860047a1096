"""The comparison with peers: every contestant does its task, ratios and limits are what they say, a report is made."""
from __future__ import annotations

import importlib.util
import json
import re
import types

import pytest
import torch
import yaml
from helpers import ROOT, refused, run_script

import ops
from benchmarks import chart, compare_peers, contestants, limits
from benchmarks.contestants import GENERATE, ONE_CODE, OURS, PEER, PLAIN, REPAIRED, SHIPPED, TRAIN_CODES, TRAIN_IMAGES
from models.config import DalleConfig
from models.dalle import DalleModel
from utils.errors import UserError

HAS_PEER = importlib.util.find_spec("dalle_pytorch") is not None
needs_peer = pytest.mark.skipif(not HAS_PEER, reason="dalle-pytorch is not installed")


def contestant(name, task):
    made = contestants.KINDS[name](contestants.COMMAND.parse([name, task, "--config", "demo"]))
    made.prepare(task)
    return made


def entrants(*tasks):
    pairs = [(name, task) for task in tasks for name in compare_peers.ENTRIES[task]]
    return [pytest.param(*pair, marks=needs_peer if pair[0] in (PEER, REPAIRED) else ()) for pair in pairs]


@pytest.mark.parametrize("name, task", entrants(TRAIN_CODES, TRAIN_IMAGES))
def test_contestants_train_the_same_model(name, task, clean_modules):
    made = contestant(name, task)
    model = getattr(made, "dalle", None) or made.engine.model.dalle
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, [p for p in model.parameters() if p.requires_grad]))
    assert contestants.count(made) == sum(p.numel() for p in DalleModel(made.shape).parameters())


@pytest.mark.parametrize("name, task", entrants(GENERATE))
def test_contestants_sample(name, task, clean_modules, monkeypatch):
    made, decoded = contestant(name, task), []
    inner = made.vqgan.decode
    monkeypatch.setattr(made.vqgan, "decode", lambda codes: decoded.extend(codes) or inner(codes))
    slow = name in compare_peers.WHOLE_SEQUENCE
    made.sample(1 if slow else 2)
    assert len(decoded) == (1 if slow else 2) and all(len(codes) == made.shape.image_seq_len for codes in decoded)
    if slow:
        made.token(3, 2)


@pytest.mark.parametrize("name, most_codes", [(OURS, 3), (SHIPPED, 4)])
def test_windows_of_the_trained_model_bring_what_they_say(name, most_codes):
    made = contestant(name, contestants.WINDOWS)
    made.prompts = made.prompts[:1]
    codes = made.dalle.config.image_seq_len - 1
    assert made.window(1) == {"codes_per_pass": 1.0, "codes": codes}
    found = made.window(most_codes)
    assert found["codes"] == codes and 1 <= found["codes_per_pass"] <= most_codes
    assert name == OURS or found["codes_per_pass"] > 1.5  # the weights are those that were trained
    assert made.window(most_codes) == found  # in every turn


def test_a_pass_costs_what_it_takes_beside_a_pass_of_one_code(monkeypatch):
    class Fake:
        def __init__(self, name, task, options):
            self.name, self.seconds = name, iter([9, 9, 1, 2, 3, 9])  # a turn to warm up, and two

        def ask(self, do, width):
            self.answer = {"codes_per_pass": width / 2 if width > 1 else 1.0, "codes": 10}
            return next(self.seconds)

        def close(self):
            pass

    monkeypatch.setattr(compare_peers, "Worker", Fake)
    options = compare_peers.COMMAND.parse(["--turns", "2", "--widths", "8"])
    one, eight = compare_peers.measure_windows([SHIPPED], options)
    assert one == {"name": SHIPPED, "width": 1, "codes_per_pass": 1.0, "seconds": pytest.approx(0.2), "cost": 1.0}
    assert eight == {"name": SHIPPED, "width": 8, "codes_per_pass": 4.0, "seconds": pytest.approx(2.2),
                     "cost": pytest.approx((0.8 / 0.1 + 3.6 / 0.3) / 2)}
    text = compare_peers.table([], dict(report_of([], options), windows=[dict(eight, name=OURS), eight]))
    assert re.findall(r"8 +(\S+) +2200.00 +10.00", text) == ["-", "4.00"]  # random weights say nothing of guesses


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_peer_that_a_gpu_has_no_room_for_does_not_end_the_run(device):
    class Fails:
        def __init__(self, name, at):
            self.name, self.device, self.at, self.turns = name, device, at, 0

        def step(self):
            self.turns += 1
            if self.turns == self.at:
                raise UserError(f"{self.name} ended early")
            return float(self.turns)

    workers = [Fails(OURS, 0), Fails(PEER, 2), Fails(PLAIN, 0)]
    if device == "cpu":  # there it is a fault
        refused("", compare_peers.alternate, workers, 2, Fails.step)
        return
    assert compare_peers.alternate(workers, 2, Fails.step) == [[2.0, 3.0], [2.0, 3.0]]
    assert [worker.name for worker in workers] == [OURS, PLAIN]
    refused("", compare_peers.alternate, [Fails(OURS, 1)], 2, Fails.step)


def test_whole_images_are_interpolated_from_a_few_positions():
    ask = lambda do, images, position=0: {"token": 1.0 + position, "decode": 0.5}[do]  # noqa: E731
    slow = types.SimpleNamespace(name=PEER, ask=ask)
    # 1 + 2 + ... + 9 seconds for nine codes, exactly what a straight line gives.
    assert compare_peers.sampling_seconds(slow, 1, 9, exact=False) == pytest.approx(45.5)


def test_the_work_of_a_step_is_what_pytorch_counts():
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False)
    config = DalleConfig(30, 20, 6, 4, 16, 2, 2, 8, attn_types=("full",))
    model = DalleModel(config)
    with counter, ops.use(attention="explicit"):
        sum(logits.sum() for logits in model(torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 16).long())).backward()
    work = limits.Work(config)
    length = config.seq_len
    hidden = length * length - length * (length + 1) // 2  # what the dense matmul computes and the mask takes away
    # The first layer's input gradient is not needed for the weights, but the embeddings want it: all is counted.
    assert work.training_flop + 3 * 2 * 2 * 2 * 16 * hidden == counter.get_total_flops()
    assert work.parameters == config.depth * (16 * 48 + 16 * 16 + 16 * 128 + 64 * 16) + 2 * ((30 + 6 + 20) * 16)


def measured(name, task, seconds, images=2, peak=10):
    return compare_peers.Measured(name, task, images, seconds, peak, False)


def report_of(found, options):
    machine = {"processor": "abacus", "threads": 1, "torch": "2", "gflop_per_second": 100.0}
    machine.update(fastest_gflop_per_second=125.0, read_gb_per_second=5.0)
    if options.device == "cuda":
        machine["datasheet_gflop_per_second"] = 200.0
    report = {"config": "tiny", "device": "cpu", "precision": "fp32", "date": "2000-01-01 00:00", "machine": machine}
    report.update(parameters=1.0, num_codes=10, gflop_per_sample=50.0, weights_gb=2.0, decode_seconds=1.0)
    report["results"] = [m.to_dict() for m in found]
    report["summary"] = compare_peers.summary(found, report, options)
    return report


def test_ratios_are_medians_of_turns_and_limits_come_from_the_machine(tmp_path):
    options = compare_peers.COMMAND.parse(["--images", "1"])
    found = [measured(OURS, TRAIN_CODES, [2.0, 1.0, 4.0], peak=6), measured(PEER, TRAIN_IMAGES, [4.0, 3.0, 20.0])]
    sampled = ((OURS, 10.0), (ONE_CODE, 15.0), (REPAIRED, 30.0))
    found += [measured(name, GENERATE, [seconds], images=1) for name, seconds in sampled]
    report = report_of(found, options)
    assert report["summary"] == {
        "training on codes, speed over DALLE-pytorch (images)": 3.0,
        "sampling 1, speed over Mini DALL-E (one code per pass)": 1.5,
        "sampling 1, speed over DALLE-pytorch (cache repaired)": 3.0,
        "training on codes, peak memory of DALLE-pytorch": 0.6, "training on codes, share of the matmul's speed": 0.5,
        "training on codes, share of the fastest matmul": 0.4,
        "Mini DALL-E, sampling 1, times the limit of one code per pass": 2.0,
        "Mini DALL-E (one code per pass), sampling 1, times the limit of one code per pass": 3.0,
    }
    text = compare_peers.table(found, report)
    assert "abacus" in text and all(key in text for key in report["summary"])
    keys = {"batch": "sample", "grid": "draw"}  # the second as older reports have it
    report["growth"] = {axis: [{axis: v, "train": v, keys[axis]: 2 * v} for v in (1, 2)] for axis in keys}
    chart.draw(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    report["results"] = [dict(report["results"][-1], name="DALLE-pytorch, cache repaired")]
    assert [bar[0] for bar in chart.panels(report)[0][2]] == [REPAIRED]


def test_the_gpu_benchmark_finds_its_figures_in_the_table():
    """What benchmarks.yml looks for, in the table of a run on a GPU whose datasheet is known."""
    options = compare_peers.COMMAND.parse(["--device", "cuda", "--precision", "bf16", "--images", "96"])
    found = [measured(OURS, TRAIN_CODES, [1.0])]
    sampled = ((OURS, 1.25), (contestants.WITHOUT_GRAPHS, 5.0))
    found += [measured(name, GENERATE, [seconds], images=96) for name, seconds in sampled]
    report = report_of(found, options)
    text = compare_peers.table(found, report)
    metrics = yaml.safe_load((ROOT / "benchmarks.yml").read_text())["dalle_compare_cuda"]["data"]
    values = {name: re.findall(metric["regexp"], text) for name, metric in metrics.items()}
    assert values == {"matmul_share": ["1.00"], "datasheet_share": ["0.50"], "seconds_96": ["1.25"]}
    assert report["summary"]["sampling 96, speed over Mini DALL-E (no CUDA graphs)"] == 4.0


@pytest.mark.parametrize("flags, expected", [
    ("--config minDALLE_1.3B --device cuda --precision bf16 --compile",
     {"compile": True, "activation_checkpointing": False}),  # on a GPU all train without recomputing
    ("--config L16 --matmul-precision highest", {"matmul_precision": "highest"}),
    ("--config L16 --matmul-precision medium", {"matmul_precision": "medium"}),
    ("--config L16", {"matmul_precision": None}),
])
def test_the_settings_of_all_are_those_asked_for(flags, expected):
    execution = contestants.settings(contestants.COMMAND.parse([OURS, TRAIN_CODES, *flags.split()])).execution
    assert {name: getattr(execution, name) for name in expected} == expected


def test_names_cover_everybody_and_datasheets_are_known_by_the_names_that_gpus_report():
    assert set(contestants.KINDS) == set(contestants.NAMES) and set(compare_peers.ENTRIES) == set(contestants.TASKS)
    assert limits.datasheet("NVIDIA H200", "bf16") == limits.datasheet("NVIDIA H100 80GB HBM3", "fp16") == 989_000
    assert limits.datasheet("NVIDIA H100 PCIe", "bf16") == 756_000
    assert limits.datasheet("NVIDIA H200", "fp32") is None and limits.datasheet("abacus", "bf16") is None


@pytest.mark.slow
@needs_peer
def test_the_whole_comparison(tmp_path):
    command = "benchmarks/compare_peers.py --config demo --turns 1 --images 1 2 --matmul-precision high --growth"
    done = run_script(*command.split(), "--growth-batches", 1, 2, "--growth-grids", 4, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "compare_peers.json").read_text())
    assert report["precision"] == "fp32 (matmul high)"
    assert len(report["results"]) == 2 + 3 + 2 * 5 and len(report["growth"]["batch"]) == 2
    assert len(report["windows"]) == 2 * 5 and (tmp_path / "compare_peers.png").is_file() and "peak GB" in done.stdout
