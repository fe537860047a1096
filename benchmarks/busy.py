#!/usr/bin/env python3
"""Speed on a busy machine for each number of threads, and for the number chosen by default.

    python benchmarks/busy.py                            the demo and L16, sampling and training
    python benchmarks/busy.py --configs demo --turns 9

Starts its own competitors: one endless loop per core. All contestants are processes that take turns, so that other load
on the machine affects all of them alike.
"""
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import log  # noqa: E402
from benchmarks.compare_peers import PeerOptions, Worker, alternate, processor  # noqa: E402
from benchmarks.contestants import GENERATE, OURS, TRAIN_CODES  # noqa: E402
from utils.errors import run_main  # noqa: E402
from utils.files import make_folder  # noqa: E402
from utils.options import Command, Options, again, option  # noqa: E402

WORK: dict[tuple[str, str], tuple[int, dict[str, object]]] = {
    ("demo", GENERATE): (16, {"do": "sample", "images": 16}),
    ("demo", TRAIN_CODES): (4, {"do": "train"}),
    ("L16", GENERATE): (1, {"do": "sample", "images": 1}),
    ("L16", TRAIN_CODES): (2, {"do": "train"}),
}
"""What is timed, by configuration and task: number of samples, and the request."""


CONFIGS = tuple(dict.fromkeys(config for config, _ in WORK))


@dataclass(frozen=True)
class BusyOptions(Options):
    """The flags of this command."""

    configs: tuple[str, ...] = option(CONFIGS, "whose work is timed", choices=CONFIGS)
    turns: int = again(PeerOptions, "turns", help="timed turns of each contestant, after one to warm up")
    output: str = again(PeerOptions, "output", default="output/busy", help="folder of the contestants' log")


COMMAND = Command("benchmarks/busy.py", "Time this project on a busy machine.", BusyOptions)


def measure(config: str, task: str, options: BusyOptions) -> None:
    """Print the speed of one workload with 0 (chosen), 1, ... threads, on an idle and on a busy machine."""
    cores = len(os.sched_getaffinity(0))
    samples, request = WORK[config, task]
    threads = [0, *range(1, cores + 1)]
    workers = [
        Worker(OURS, task, PeerOptions(config=config, threads=count, batch_size=samples, output=options.output))
        for count in threads
    ]
    try:
        for busy in (0, cores):
            competitors = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                seconds = alternate(workers, options.turns, lambda worker: worker.ask(**request))
            finally:
                for competitor in competitors:
                    competitor.kill()
                    competitor.wait()
            rates = [samples / median(own) for own in seconds]
            share = rates[0] / max(rates[1:])
            columns = "".join(f"{rate:>10.2f}" for rate in rates)
            line = f"{config:<8}{task:<18}{busy:>5}{columns}{share:>10.2f}"
            print(line, flush=True)  # noqa: T201
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    """Run it."""
    options = COMMAND.parse()
    log.setup()
    make_folder("--output", options.output)
    counts = "".join("{:>10}".format(f"{n} threads") for n in range(1, len(os.sched_getaffinity(0)) + 1))
    print(f"samples/s on {processor()}; busy: other processes")  # noqa: T201
    print("{:<8}{:<18}{:>5}{:>10}{}{:>10}".format("config", "task", "busy", "chosen", counts, "of best"))  # noqa: T201
    for config, task in WORK:
        if config in options.configs:
            measure(config, task, options)


if __name__ == "__main__":
    run_main(main)
