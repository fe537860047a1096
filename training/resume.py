"""The start of a run: its newest checkpoint, which must fit the current options, or the weights of another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ContextManager

import args
import checkpoints
from args import Config
from bpe import find_vocabulary
from dalle import published
from dalle.loading import recorded_files
from models.config import ARCHITECTURES, DalleConfig
from training.files import reading
from training.schedule import Position
from training.setup import MODEL_OPTIONS, Parts, Start, identities
from utils import resume
from utils.errors import UserError

if TYPE_CHECKING:
    from training.run import Run

logger = logging.getLogger(__name__)


def find_start(config: Config, folder: Path) -> Start | None:
    """The checkpoint to start from: the newest complete one with --resume, or --pretrained-checkpoint; else None."""
    if config.checkpoints.pretrained_checkpoint:
        path = published.resolve(config.checkpoints.pretrained_checkpoint)
        if not path.exists():
            known = ", ".join(published.PUBLISHED_MODELS)
            raise UserError(f"--pretrained-checkpoint {path}: no such file or folder. Known by name: {known}")
        return Start(path, checkpoints.read_dalle(path))
    if not config.checkpoints.resume:
        return None
    newest = checkpoints.newest_checkpoint(folder, together=True)
    if newest is None:
        logger.info(f"--resume: no complete checkpoint in {folder}, starting from the beginning")
        return None
    checkpoint = checkpoints.read_dalle(newest, verified=True)
    if checkpoint.training is None:
        raise UserError(f"--resume: {newest} holds no training state; start from it with --pretrained-checkpoint")
    return Start(newest, checkpoint)


def with_parts_of(start: Start | None, config: Config) -> Config:
    """If neither flags nor configuration name a vocabulary or a VQGAN, take those of the checkpoint to start from.

    They are beside a model in minDALL-E's layout; other checkpoints record their paths.
    """
    if start is None:
        return config
    if start.checkpoint.format == "mindalle":
        folder = start.checkpoint.path.parent
        vocabulary, vqgan = folder / published.TOKENIZER, (folder / published.STAGE1, folder / "config.yaml")
    else:
        recorded = recorded_files(start.checkpoint, "vqgan")
        vqgan = (Path(recorded.get("weights", "")), Path(recorded.get("config", "")))
        vocabulary = Path(find_vocabulary(recorded_files(start.checkpoint, "tokenizer").get("path", "")))
    found: dict[str, Any] = {}
    if config.data.bpe_path is None and vocabulary != Path() and vocabulary.exists():
        found["bpe_path"] = str(vocabulary)
    if config.model.vqgan_model_path is None and all(path.is_file() for path in vqgan):
        found.update(vqgan_model_path=str(vqgan[0]), vqgan_config_path=str(vqgan[1]))
    for name, path in found.items():
        logger.info(f"{args.flag_name(name)} {path}, of {start.path}")
    return config.replace(**found)


def reading_state(start: Start) -> ContextManager[None]:
    """Within the context any error in a checkpoint's training state becomes one line."""
    way_out = "; start from it with --pretrained-checkpoint"
    return reading(start.path, "holds no training state of Mini DALL-E", way_out)


def changed_options(start: Start, config: Config) -> resume.Changes:
    """Return the options that a resumed run changes. Raises UsageError for those that cannot change."""
    rules, model = args.resume_rules(), DalleConfig.from_dict(start.checkpoint.config).to_dict()
    now = {name: value for name, value in config.to_dict().items() if rules.get(name) in (args.APPLIES, args.FIXED)}
    for field, name in MODEL_OPTIONS.items():
        # A run that started from --pretrained-checkpoint took its shape from the model, not from its configuration.
        value = now[name]
        if value is None:  # the architecture's own, which may also be spelled out
            value = ARCHITECTURES[config.model.architecture].get(field, getattr(DalleConfig, field, None))
        if rules[name] == args.FIXED and model[field] == value:
            del now[name]
    with reading_state(start):
        found = resume.changes(start.training.get("config"), now)
    fixed = [name for name, rule in rules.items() if rule == args.FIXED]
    resume.refuse(found, fixed, args.flag_name, start.path, "start a new run in another --checkpoint-output-dir")
    return found


def saved_position(start: Start, config: Config) -> Position:
    """Return the position at which a checkpoint was saved. Raises UserError if it has none."""
    with reading_state(start):
        values = dict(start.training["position"])
        if "step_in_epoch" in values:  # of an older version, which counted steps of a fixed global batch
            saved = dict(config.to_dict(), **start.training.get("config", {}))
            batch = saved["batch_size"] * saved["gradient_accumulation"] * saved["replication_factor"]
            values.update(sample_in_epoch=values.pop("step_in_epoch") * batch, samples=values["step"] * batch)
        position = Position(**values)
        if not all(isinstance(value, (int, float)) and value >= 0 for value in vars(position).values()):
            raise ValueError(f"position {values}")
        return position


def restore(run: Run, start: Start) -> None:
    """Restore the states of engine and schedule, and log position and changed options. Raises UserError.

    An epoch whose rest does not fill a global batch has ended.
    """
    schedule, position, training = run.schedule, run.position, start.training
    with reading_state(start):
        if training["num_samples"] != schedule.num_samples:
            logger.warning(
                f"the training set has {schedule.num_samples} samples, it had {training['num_samples']} when "
                f"{start.path} was written: their order differs"
            )
        run.engine.load_state_dict(dict(training["engine"], optimizer=start.checkpoint.opt_state))
        schedule.load_state_dict(start.checkpoint.scheduler_state or {})
    if not run.changes.keys().isdisjoint(("learning_rate", "lr_scheduler")):
        schedule.plateau.restart(run.config.optimizer.learning_rate)
    done, call = position.sample_in_epoch, schedule.samples_per_call
    place = f"epoch {position.epoch}, step {position.step}, sample {done} of {schedule.num_samples}"
    logger.info(f"resumed {start.path}: {place}")
    if run.changes:
        logger.info(f"changed options: {resume.listed(run.changes, args.flag_name)}")
    skipped = max(0, schedule.num_samples - done) % call
    if done % call and skipped:
        text = f"its last {skipped} sample(s) do not fill a batch of {call} and are skipped"
        logger.info(f"epoch {position.epoch}: {text}")
    position.validation_due |= bool(done) and not schedule.steps_in_epoch(done)


def require_same_files(start: Start, config: Config, parts: Parts) -> None:
    """Raise UserError if vocabulary or VQGAN of a run differ from those of its checkpoint."""
    own = identities(config, parts)
    for what, key, option, recorded in (
        ("tokenizer", "sha256", "bpe_path", "path"),
        ("vqgan", "sha256", "vqgan_model_path", "weights"),
        ("vqgan", "options", "vqgan_config_path", "config"),
    ):
        with reading_state(start):
            saved = start.checkpoint.identity[what]
            known = saved.get(key, own[what][key]) if key == "options" else saved[key]
        if known != own[what][key]:  # (older versions did not record the VQGAN's options)
            raise UserError(
                f"--resume: {start.path} was trained with another file ({saved.get(recorded) or 'CLIP vocabulary'}) "
                f"than {args.flag_name(option)} now names"
            )
