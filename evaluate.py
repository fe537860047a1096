"""Evaluate a trained model: its loss on image-caption pairs, and retrieval@1 of the images generated on the demo set.

    python evaluate.py --dalle-path demo                         # the shipped model on the held-out demo images
    python evaluate.py --dalle-path output/ckpt/dalle_799.pt --input-folder data/COCO/val2017 --json result.json

Validation loss: nats per token, for text and image, and bits per code (a uniform guess costs log2(codebook size)).
Retrieval@1, on the demo set: the model samples one image for each held-out caption and for 200 training captions; it is
a hit if the nearest image of the set by pixel distance is the caption's own. No model can exceed the VQGAN that decodes
its codes, so the same figure is reported for reconstructions of the real images.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it reports errors of the imports below

# isort: split
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Sequence

import log
from dalle.evaluation import COMMAND, EvaluateOptions, evaluate, finite, report
from dalle.loading import load
from dalle.measuring import plot_sweep, settings_of
from dalle.pictures import make_sheet, save_picture
from dalle.scoring import Scorers
from engines.native import pick_device
from metrics.distances import check_counts
from utils.errors import UsageError, UserError, run_main
from utils.files import check_writable, write_json, writing
from utils.parts import Parts
from utils.processes import Processes
from utils.prompt_lists import Prompt, read_prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    options = COMMAND.parse(argv)
    with Processes.started() as processes, contextlib.closing(open_parts(options, processes)) as parts:
        log.setup(is_main=processes.is_first)
        for flag, file in (("--json", options.json), ("--sheet", options.sheet), ("--plot", options.plot)):
            if file is not None:
                check_writable(flag, file)
        if options.json and options.sheet and os.path.realpath(options.json) == os.path.realpath(options.sheet):
            raise UsageError(f"--json and --sheet name the same file, {options.sheet}: give each its own")
        if processes.size > 1 and options.reconstruction:
            raise UsageError("--reconstruction is measured by one process: start it without torchrun")
        parts.check(settings_of(options))  # now, not when the model is loaded
        prompts = asked_prompts(options)
        device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", "0")))
        files = (options.bpe_path, options.vqgan_model_path, options.vqgan_config_path)
        loaded = load(options.dalle_path, *files, device) if options.dalle_path else None
        result, samples = evaluate(options, loaded, device, parts, prompts)
        processes.barrier("results are read")  # by all, before the first deletes the parts
        if processes.is_first:
            write(options, result, samples)
            parts.remove()


def asked_prompts(options: EvaluateOptions) -> list[Prompt]:
    """The prompts of --prompts-file. Also shows what is wrong with a --scorer before a model is loaded."""
    Scorers(options.scorer)
    if options.prompts_file is None:
        return []
    prompts = read_prompts(options.prompts_file, options.caption_column)
    if not prompts:
        raise UserError(f"--prompts-file {options.prompts_file}: there are no prompts in it")
    source = "--num-images is" if options.num_images else f"--prompts-file {options.prompts_file} has"
    check_counts(options.metrics, (options.num_images or len(prompts), source))
    return prompts


def open_parts(options: EvaluateOptions, processes: Processes) -> Parts:
    """Where processes leave what they compute: beside --json, else in a temporary folder, or in memory."""
    if options.json is not None and not options.reconstruction:
        return Parts(processes, Path(options.json + ".parts"), options.resume)
    if processes.size == 1:
        return Parts(processes)
    own = [tempfile.mkdtemp(prefix="evaluate-")] if processes.is_first else []
    return Parts(processes, Path(processes.gather("folder", own)[0]), temporary=True)


def write(options: EvaluateOptions, result: dict[str, Any], samples: list[Any]) -> None:
    """Print the results, and write the files that the options name."""
    sys.stdout.write(report(result) + "\n")
    if options.json is not None:
        with writing("--json", options.json):
            write_json(options.json, finite(result), indent=2, allow_nan=False)
    if options.sheet is not None:
        with writing("--sheet", options.sheet):
            save_picture(make_sheet(samples), options.sheet)
    if options.plot is not None:
        with writing("--plot", options.plot):
            plot_sweep(result, options.plot)


if __name__ == "__main__":
    run_main(main)
