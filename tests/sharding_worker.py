"""One of the processes of test_sharding.py: trains one run after the other, without starting Python anew for each.

    RANK=0 WORLD_SIZE=2 ... python tests/sharding_worker.py runs.json     # [{"port": ..., "flags": [...], ...}, ...]

A run may have "start": a checkpoint to be put into its folder first, "poison": [process, steps] (see
test_numerics.poison), "model": fields of DalleConfig that no flag has, and "scale": the first scale of fp16 gradients,
for which the command line would want a GPU.
"""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import test_numerics  # noqa: E402

import args  # noqa: E402
import engines  # noqa: E402
import train  # noqa: E402
from engines import sharding  # noqa: E402
from training import setup  # noqa: E402


def scaler(run):
    make = sharding.make_scaler if "--shard" in run["flags"] else torch.amp.GradScaler
    return make("cpu", init_scale=run["scale"])


def main():
    torch.set_num_threads(1)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(run["port"])
        with pytest.MonkeyPatch.context() as patch:
            if "model" in run:
                describe = setup.dalle_config
                patch.setattr(setup, "dalle_config", lambda *a: dataclasses.replace(describe(*a), **run["model"]))  # noqa: B023
            if "poison" in run:
                test_numerics.poison(patch, set(run["poison"][1]), rank=run["poison"][0])
            if "start" in run and os.environ["RANK"] == "0":  # the other process waits for this one in engines.create
                folder = Path(args.parse(run["flags"]).checkpoints.checkpoint_output_dir)
                folder.mkdir(parents=True)
                shutil.copy(run["start"], folder)
            engine = None
            try:
                engine = engines.create(args.parse(run["flags"]))
                if "scale" in run:
                    engine.autocast_dtype, engine.scaler = torch.float16, scaler(run)
                train.train(engine.config, engine)
            finally:
                if engine is not None:
                    engine.close()


if __name__ == "__main__":
    main()
