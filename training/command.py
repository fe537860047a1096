"""What train.py runs after it has read its flags."""
from __future__ import annotations

import logging
import sys

import engines
import log
from args import Config
from bpe import load_tokenizer
from engines.ipu import plan_report
from models.building import shapes_only
from models.vqgan import VQGAN
from training.files import folders_locked
from training.run import train
from training.setup import dalle_config, vqgan_config
from utils.interrupts import Interruption

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train, or show a plan of IPUs. Returns the exit status."""
    if config.ipu.plan:
        show_plan(config)
        return 0
    engine = engines.create(config)
    try:
        with Interruption(tell=engine.is_main) as interruption, folders_locked(config, engine):
            log.setup(config.log_dir, engine.is_main)
            logger.info(config.describe())
            engine.introduce()
            train(engine.config, engine, interruption=interruption)
            return interruption.status
    finally:
        engine.close()


def show_plan(config: Config) -> None:
    """--plan: what each IPU would hold, as text and as plan.png. Reads the vocabulary and a VQGAN's YAML, no data."""
    vqgan = vqgan_config(config)
    with shapes_only():
        model = dalle_config(config, load_tokenizer(config.data.bpe_path), VQGAN(vqgan))
    found = plan_report.divisions(config, model, vqgan)
    sys.stdout.write(plan_report.describe(config, model, found) + "\n")
    if found:
        chart = config.log_dir / "plan.png"
        plan_report.draw(found, chart)
        sys.stdout.write(f"chart: {chart}\n")
