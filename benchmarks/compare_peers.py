#!/usr/bin/env python3
"""Compare this project with its peers in one run: training, sampling, memory, and distance from the machine's limits.

    python benchmarks/compare_peers.py                         the table, compare_peers.json and .png
    python benchmarks/compare_peers.py --growth                also how cost grows with batch and grid
    python benchmarks/compare_peers.py --config minDALLE_1.3B --device cuda --precision bf16 --batch-size 16 \\
        --compile --images 1 96                                on a GPU: also the share of its datasheet's speed

Every contestant runs in a process of its own (benchmarks/contestants.py). They take turns, so that other load on the
machine affects all of them alike; medians are shown, and ratios are medians of the ratios within a turn. Contestants
that compute a whole sequence for each code are timed at a few positions of an image and the rest is interpolated
(--exact samples whole images). The peer is skipped where it is not installed:

    pip install einops && pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import logging
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import log  # noqa: E402
from benchmarks import chart, limits  # noqa: E402
from benchmarks.contestants import (  # noqa: E402
    GENERATE,
    NAMES,
    OLD_NAMES,
    ONE_CODE,
    OURS,
    PEER,
    PLAIN,
    REPAIRED,
    SHIPPED,
    TRAIN_CODES,
    TRAIN_IMAGES,
    WINDOWS,
    WITHOUT_GRAPHS,
    SettingOptions,
    settings,
    shape,
)
from utils.errors import UserError, run_main  # noqa: E402
from utils.files import make_folder, write_json  # noqa: E402
from utils.options import Command, option  # noqa: E402

logger = logging.getLogger(__name__)

#: Who does what. The peer reads codes as well as images; sampling is where its cache matters.
ENTRIES: dict[str, tuple[str, ...]] = {
    TRAIN_CODES: (OURS, PEER),
    TRAIN_IMAGES: (OURS, PLAIN, PEER),
    GENERATE: (OURS, ONE_CODE, WITHOUT_GRAPHS, REPAIRED, PEER, PLAIN),
    WINDOWS: (OURS, SHIPPED),
}
#: Contestants that compute the whole sequence for each code.
WHOLE_SEQUENCE = (PEER, PLAIN)
#: Positions of an image at which those are timed, as shares of its codes.
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PeerOptions(SettingOptions):
    """The flags of this command."""

    images: tuple[int, ...] = option((1, 8, 32), "images sampled at once", ge=1)
    turns: int = option(5, "turns, after one to warm up; fewer for many images", ge=1)
    tasks: tuple[str, ...] = option(tuple(ENTRIES), "what is timed", choices=tuple(ENTRIES))
    contestants: tuple[str, ...] = option(NAMES, "who is timed", choices=(*NAMES, *OLD_NAMES))
    widths: tuple[int, ...] = option((2, 4, 8, 16), "codes that a pass takes, in the task windows", ge=2, le=64)
    exact: bool = option(False, "sample whole images with the slow contestants too")
    growth: bool = option(False, "also measure growth with batch and grid")
    growth_batches: tuple[int, ...] = option((1, 2, 4, 8, 16, 32), "batches of --growth", ge=1, needs="growth")
    growth_grids: tuple[int, ...] = option((16, 20, 24, 28, 32), "grids of --growth", ge=1, needs="growth")
    output: str = option("output/compare_peers", "folder for the JSON and the chart", path=True)


COMMAND = Command("benchmarks/compare_peers.py", "Compare this project with its peers.", PeerOptions)


class Measured(NamedTuple):
    """What one contestant took for one task, in every turn."""

    name: str
    task: str
    images: int
    """Images sampled together, or samples of a training step."""
    seconds: list[float]
    """A training step, or all images from caption to pixels."""
    peak: int
    """Bytes: the most its process ever held."""
    interpolated: bool

    def to_dict(self) -> dict[str, Any]:
        return dict(self._asdict(), median=median(self.seconds))


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, task: str, options: PeerOptions, batch: int = 0, grid: int = 0) -> None:
        self.name, self.task, self.device, self.peak = name, task, options.device, 0
        command = [sys.executable, "-m", "benchmarks.contestants", name, task, "--config", options.config]
        command += ["--device", options.device, "--precision", options.precision, "--threads", str(options.threads)]
        command += ["--batch-size", str(batch or options.batch_size), "--grid", str(grid)]
        command += ["--compile"] if options.compile else []
        command += ["--matmul-precision", options.matmul_precision] if options.matmul_precision else []
        self.log = open(Path(options.output, "contestants.log"), "ab")
        self.process = subprocess.Popen(
            command, cwd=str(ROOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=0
        )
        assert self.process.stdin and self.process.stdout  # pipes, as asked for
        self.input, self.output = self.process.stdin, self.process.stdout
        self.parameters = self._answer()["parameters"]

    def _answer(self) -> dict[str, Any]:
        line = self.output.readline()
        if not line:
            self.close()
            raise UserError(f"{self.name} ({self.task}) ended early: see {self.log.name}")
        return json.loads(line)

    def ask(self, **request: Any) -> float:
        """Have it do something; seconds it took."""
        self.input.write((json.dumps(request) + "\n").encode())
        self.answer = self._answer()
        self.peak = self.answer["peak"]
        return self.answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.input.close()
        self.process.wait()
        self.output.close()
        self.log.close()


def alternate(workers: list[Worker], turns: int, turn: Any) -> list[list[float]]:
    """Let the workers take turns after one to warm up; each one's seconds. Peers that end early leave the list."""
    seconds: list[list[float]] = [[] for _ in workers]
    for index in range(turns + 1):
        for worker, own in list(zip(workers, seconds)):
            try:
                value = turn(worker)
            except UserError as error:
                if worker.name == OURS or worker.device != "cuda":
                    raise
                logger.warning("skipped: %s", error)  # a peer that runs out of memory must not end the run
                place = workers.index(worker)
                del workers[place], seconds[place]
                continue
            if index:
                own.append(value)
    return seconds


def measure_training(names: Sequence[str], task: str, options: PeerOptions) -> list[Measured]:
    """One training task: every contestant's steps, in turns."""
    workers = [Worker(name, task, options) for name in names]
    try:
        seconds = alternate(workers, options.turns, lambda worker: worker.ask(do="train"))
        return [Measured(w.name, task, options.batch_size, own, w.peak, False) for w, own in zip(workers, seconds)]
    finally:
        for worker in workers:
            worker.close()


def sampling_seconds(worker: Worker, images: int, num_codes: int, exact: bool) -> float:
    """Seconds in which a contestant samples and decodes so many images."""
    if exact or worker.name not in WHOLE_SEQUENCE:
        return worker.ask(do="sample", images=images)
    at = [round(share * (num_codes - 1)) for share in POSITIONS]
    costs = [worker.ask(do="token", position=position, images=images) for position in at]
    pieces = zip(zip(at, at[1:]), zip(costs, costs[1:]))
    tokens = sum((right - left) * (first + second) / 2 for (left, right), (first, second) in pieces)
    return (tokens + (costs[0] + costs[-1]) / 2) + worker.ask(do="decode", images=images)


def measure_sampling(names: Sequence[str], options: PeerOptions, num_codes: int) -> list[Measured]:
    """Sampling, for each number of images: every contestant in turns."""
    workers = [Worker(name, GENERATE, options) for name in names]
    found = []
    try:
        for images in options.images:
            turns = max(1, options.turns if images == 1 else options.turns // 2 if images < 32 else options.turns // 4)
            seconds = alternate(
                workers,
                turns,
                functools.partial(sampling_seconds, images=images, num_codes=num_codes, exact=options.exact),
            )
            for worker, own in zip(workers, seconds):
                interpolated = worker.name in WHOLE_SEQUENCE and not options.exact
                found.append(Measured(worker.name, GENERATE, images, own, worker.peak, interpolated))
            logger.info("sampling %d: %s", images, ", ".join(f"{m.name} {median(m.seconds):.1f} s" for m in found))
        return found
    finally:
        for worker in workers:
            worker.close()


def measure_windows(names: Sequence[str], options: PeerOptions) -> list[dict[str, Any]]:
    """Codes that passes of each width give, and what such a pass takes, also in passes of one code in the same turn."""
    workers, found = [Worker(name, WINDOWS, options) for name in names], []
    try:
        for worker in workers:
            given: dict[int, float] = {}  # codes per pass, the same in every turn

            def seconds_of_a_pass(width: int, worker: Worker = worker, given: dict[int, float] = given) -> float:
                seconds = worker.ask(do="window", width=width)
                given[width] = worker.answer["codes_per_pass"]
                return seconds * given[width] / worker.answer["codes"]

            turns = [[seconds_of_a_pass(width) for width in (1, *options.widths)] for _ in range(options.turns + 1)][1:]
            for width, seconds in zip((1, *options.widths), zip(*turns)):
                costs = [own / one for own, (one, *_) in zip(seconds, turns)]
                figures = dict(codes_per_pass=given[width], seconds=median(seconds), cost=median(costs))
                found.append(dict(name=worker.name, width=width, **figures))
        return found
    finally:
        for worker in workers:
            worker.close()


def measure_growth(options: PeerOptions) -> dict[str, list[dict[str, float]]]:
    """How this project's cost grows with the batch and with the grid."""
    growth: dict[str, list[dict[str, float]]] = {"batch": [], "grid": []}
    for axis, values in (("batch", options.growth_batches), ("grid", options.growth_grids)):
        for value in values:
            batch, grid = (value, 0) if axis == "batch" else (options.batch_size, value)
            images = value if axis == "batch" else 1
            point: dict[str, float] = {axis: value}
            for key, task, request in (
                ("train", TRAIN_CODES, {"do": "train"}),
                ("sample", GENERATE, {"do": "sample", "images": images}),
            ):
                worker = Worker(OURS, task, options, batch, grid)
                try:
                    worker.ask(**request)
                    seconds = median(worker.ask(**request) for _ in range(3 if key == "train" else 1))
                    point[key] = seconds / (batch if key == "train" else images)
                    point[key + "_peak"] = worker.peak
                finally:
                    worker.close()
            growth[axis].append(point)
            train, sample = point["train"], point["sample"]
            logger.info("%s %d: training %.2f s per sample, sampling %.2f s per image", axis, value, train, sample)
    return growth


def ratio(found: Sequence[Measured], task: str, other: str, other_task: str, images: int) -> float | None:
    """How many times faster this project is than another: the median of the turns' ratios."""
    by = {(m.name, m.task, m.images): m.seconds for m in found}
    ours, theirs = by.get((OURS, task, images)), by.get((other, other_task, images))
    if ours is None or theirs is None:
        return None
    return median(b / a for a, b in zip(ours, theirs))


def summary(found: Sequence[Measured], report: dict[str, Any], options: PeerOptions) -> dict[str, Any]:
    """The key figures: ratios to the peers, and shares of what the machine allows."""
    batch, machine = options.batch_size, report["machine"]
    by = {(m.name, m.task, m.images): m for m in found}
    result: dict[str, Any] = {}

    def add(key: str, value: float | None) -> None:
        if value is not None:
            result[key] = round(value, 3)

    for name in (ONE_CODE, WITHOUT_GRAPHS, PEER, PLAIN, REPAIRED):
        label = f"training on codes, speed over {name} (images)"
        add(label, ratio(found, TRAIN_CODES, name, TRAIN_IMAGES, batch))
        add(f"training on images, speed over {name}", ratio(found, TRAIN_IMAGES, name, TRAIN_IMAGES, batch))
        for images in options.images:
            label = f"sampling {images}, speed over {name}"
            add(label, ratio(found, GENERATE, name, GENERATE, images))
    ours, peer = by.get((OURS, TRAIN_CODES, batch)), by.get((PEER, TRAIN_IMAGES, batch))
    if ours and peer:
        add(f"training on codes, peak memory of {PEER}", ours.peak / peer.peak)
    if ours:
        speed = report["gflop_per_sample"] * batch / median(ours.seconds)
        add("training on codes, share of the matmul's speed", speed / machine["gflop_per_second"])
        add("training on codes, share of the fastest matmul", speed / machine["fastest_gflop_per_second"])
        promised = machine.get("datasheet_gflop_per_second")
        add("training on codes, share of the datasheet's speed", speed / promised if promised else None)
    limit = report["weights_gb"] * report["num_codes"] / machine["read_gb_per_second"]
    for name, images in itertools.product((OURS, ONE_CODE), options.images):
        sampled = by.get((name, GENERATE, images))
        if sampled:
            label = f"{name}, sampling {images}, times the limit of one code per pass"
            add(label, median(sampled.seconds) / (limit + images * report["decode_seconds"]))
    return result


def table(found: Sequence[Measured], report: dict[str, Any]) -> str:
    """The report for a terminal."""
    machine = report["machine"]
    lines = [
        "{config}, {parameters:.1f} M parameters, {device}, {precision}, {date}".format(**report),
        "{processor}, {threads} threads, PyTorch {torch}: matmul {gflop_per_second:.0f} GFLOP/s, at best "
        "{fastest_gflop_per_second:.0f}, memory {read_gb_per_second:.1f} GB/s".format(**machine),
        "",
        "{:<36}{:<17}{:>7}{:>12}{:>14}{:>12}".format("", "", "images", "seconds", "images/s", "peak GB"),
    ]
    for m in found:
        seconds = median(m.seconds)
        lines.append(
            "{:<36}{:<17}{:>7}{:>12.2f}{:>14.3f}{:>12.2f}{}".format(
                m.name, m.task, m.images, seconds, m.images / seconds, m.peak / 1e9, " *" if m.interpolated else ""
            )
        )
    if any(m.interpolated for m in found):
        lines.append(f"* interpolated from {len(POSITIONS)} positions of an image, plus decoding")
    if report.get("windows"):
        names = "", "width", "codes per pass", "ms a pass", "in passes of one code"
        lines += ["", "{:<36}{:>7}{:>16}{:>11}{:>23}".format(*names)]
    for m in report.get("windows", []):
        given = "{:.2f}".format(m["codes_per_pass"]) if m["name"] == SHIPPED else "-"  # random weights say nothing
        lines.append("{name:<36}{width:>7}{:>16}{:>11.2f}{cost:>23.2f}".format(given, 1e3 * m["seconds"], **m))
    lines.append("")
    lines += [f"{key:<80}{value:>8.2f}" for key, value in report["summary"].items()]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, or the GPU's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(options: PeerOptions) -> dict[str, Any]:
    """Everything known before anything is timed."""
    config = settings(options)
    wanted, vqgan = shape(config)
    matmul_precision = options.matmul_precision or ("high" if options.device == "cuda" else "highest")
    torch.set_float32_matmul_precision(matmul_precision)  # of the limits too
    speed = limits.Machine(options.device, options.precision)
    codes = torch.zeros(1, wanted.image_seq_len, dtype=torch.long)
    torch.nn.utils.convert_conv2d_weight_memory_format(vqgan, torch.channels_last)
    decode = 0.0  # negligible on a GPU
    if options.device == "cpu":
        decode = median(limits.seconds_of(lambda: vqgan.decode(codes)) for _ in range(3))
    work = limits.Work(wanted)
    processor_name = processor() if options.device == "cpu" else torch.cuda.get_device_name()
    return {
        "config": options.config,
        "device": options.device,
        "precision": options.precision + (f" (matmul {matmul_precision})" if options.matmul_precision else ""),
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python", *sys.argv]),
        "parameters": work.parameters / 1e6,
        "num_codes": wanted.image_seq_len,
        "gflop_per_sample": work.training_flop / 1e9,
        "weights_gb": work.weights_read * (4 if options.precision == "fp32" else 2) / 1e9,
        "decode_seconds": decode,
        "speed": speed,
        "machine": {
            "processor": processor_name,
            "datasheet_gflop_per_second": limits.datasheet(processor_name, options.precision),
            "threads": options.threads or torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def main() -> None:
    """Measure, print the table, write JSON and chart."""
    options = COMMAND.parse()
    make_folder("--output", options.output)
    log.setup()
    names = [OLD_NAMES.get(name, name) for name in options.contestants]
    if importlib.util.find_spec("dalle_pytorch") is None:
        logger.warning("dalle-pytorch is not installed and skipped: pip install --no-deps dalle-pytorch==1.6.6 "
                       "axial-positional-embedding rotary-embedding-torch; pip install einops")
        names = [name for name in names if name not in (PEER, REPAIRED)]
    if options.device == "cpu":
        names = [name for name in names if name != WITHOUT_GRAPHS]  # there are none there
    begin, report = time.perf_counter(), describe(options)
    speed: limits.Machine = report.pop("speed")
    found: list[Measured] = []
    for task in options.tasks:
        members = [name for name in ENTRIES[task] if name in names]
        speed.measure()
        if task == GENERATE:
            found += measure_sampling(members, options, report["num_codes"])
        elif task == WINDOWS:
            report["windows"] = measure_windows(members, options)
        else:
            found += measure_training(members, task, options)
            logger.info("%s: %s", task, ", ".join(f"{m.name} {median(m.seconds):.2f} s" for m in found))
    speed.measure()
    report["machine"].update(speed.to_dict())
    report["results"] = [m.to_dict() for m in found]
    report["summary"] = summary(found, report, options)
    if options.growth:
        report["growth"] = measure_growth(options)
    report["minutes"] = (time.perf_counter() - begin) / 60
    write_json(Path(options.output, "compare_peers.json"), report, indent=1)
    chart.draw(report, Path(options.output, "compare_peers.png"))
    sys.stdout.write(table(found, report) + "\n")


if __name__ == "__main__":
    run_main(main)
