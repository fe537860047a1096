"""Data sets from options: a folder, shards, the built-in demo set or random data, with a validation split."""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bpe import warn_of_unknown
from data.classes import list_class_images
from data.datasets import DemoDataset, ImageTextFolder, PairDataset, TextSettings
from data.demo import demo_records
from data.folder import list_pairs
from data.generated import GeneratedDataset
from data.shard_index import Members
from data.shards import ImageTextShards, find_shards, open_shards
from utils.errors import UsageError, UserError
from utils.files import PathLike
from utils.skipped import SkipReport

if TYPE_CHECKING:
    from bpe import Tokenizer

logger = logging.getLogger(__name__)

DEMO = "demo"
"""Name of the built-in set, accepted wherever a folder is expected; write "./demo" for a folder of this name."""


@dataclass(frozen=True)
class DataSettings:
    """How pairs are read, augmented and skipped."""

    text_seq_len: int
    """Tokens of a caption."""
    image_size: int
    """Height and width in pixels."""
    truncate_captions: bool = False
    seed: int = 42
    null_cond_prob: float = 0.0
    """See `TextSettings`."""
    num_generated: int = 0
    """If above 0, make this many random pairs instead of reading a folder."""
    augment: str = "none"
    augment_share: float = 0.5
    """See `PairDataset`."""
    index_folder: PathLike | None = None
    """Where shard indexes are kept; None: ~/.cache/dalle/shards."""
    shard_images: str | None = None
    shard_captions: str | None = None
    """Names of shard members, see `data.shard_index.Members.named`."""
    max_bad_fraction: float = 0.01
    skipped_file: PathLike | None = None
    is_main: bool = True
    """How many pairs may be skipped, where they are listed, and whether by this process: see utils/skipped.py."""


def create_dataset(
    input_folder: str | None,
    tokenizer: Tokenizer,
    settings: DataSettings,
    *,
    demo_split: str = "all",
    flag: str = "--input-folder",
) -> PairDataset:
    """Return one data set and log its content.

    input_folder: a folder, webdataset shards (data/shards.py), or "demo" for the built-in set (`demo_split`: "train",
        "heldout" or "all"). With a vocabulary of classes, a folder with one subfolder of images per class (see
        data/classes.py). flag: the flag that sets it.

    Raises UserError for a missing or empty folder, one with too many bad pairs, and for captions that are too long
    without `truncate_captions`.
    """
    text = TextSettings(
        tokenizer, settings.text_seq_len, settings.truncate_captions, settings.seed, settings.null_cond_prob
    )
    dataset: PairDataset
    if settings.num_generated:
        dataset = GeneratedDataset(settings.num_generated, text, settings.image_size)
    elif input_folder is None:
        raise UserError("--input-folder: give a folder of images and captions, or 'demo' for the built-in set")
    elif input_folder == DEMO:
        dataset = DemoDataset(demo_records(demo_split), text, settings.image_size)
    else:
        source = f"{flag} {input_folder}"
        skipped = SkipReport(settings.skipped_file, settings.max_bad_fraction, source, is_main=settings.is_main)
        classes = getattr(tokenizer, "classes", None)
        listing = find_shards(input_folder) if classes is None else None
        if listing is not None:
            members = Members.named(settings.shard_images, settings.shard_captions)
            shards = open_shards(listing, settings.index_folder, skipped, members)
            dataset = ImageTextShards(shards, text, settings.image_size, skipped)
        else:
            pairs = list_pairs(input_folder, skipped) if classes is None else list_class_images(input_folder, classes)
            dataset = ImageTextFolder(pairs, text, settings.image_size, skipped)
    named = settings.shard_images or settings.shard_captions
    if named and flag == "--input-folder" and not isinstance(dataset, ImageTextShards):
        raise UsageError("--shard-images and --shard-captions need webdataset shards as --input-folder")
    if settings.augment == "views" and getattr(tokenizer, "classes", None) is not None:
        raise UsageError("--augment views adds words to captions, which a list of classes lacks; give flip")
    dataset.augment, dataset.augment_share = settings.augment, settings.augment_share
    dataset.held_out = isinstance(dataset, DemoDataset) and demo_split == "heldout"
    logger.info("%s", dataset.report())
    dataset.check_captions()
    if not settings.num_generated:
        warn_of_unknown(tokenizer, dataset.some_captions(), f"{flag} {input_folder}")
    return dataset


def create_datasets(
    input_folder: str | None,
    tokenizer: Tokenizer,
    settings: DataSettings,
    *,
    validation_folder: str | None = None,
    validation_holdout: int | float = 0.01,
) -> tuple[PairDataset, PairDataset | None]:
    """Return (training set, validation set or None); arguments as in `create_dataset`.

    The validation set is `validation_folder` if given, else the held-out records of the demo set, else a fraction
    (float) or number (int) `validation_holdout` of the pairs, chosen by seed; 0 means none. (The demo set's held-out
    records are never trained on, whatever that number.) Its captions are never dropped, its images never augmented, and
    its captions are always those of epoch 0 unless `set_epoch` is called.
    """
    train = create_dataset(input_folder, tokenizer, settings, demo_split="train")
    clean = replace(settings, null_cond_prob=0.0, num_generated=0, augment="none")
    if validation_folder is not None:
        try:
            flag = "--validation-folder"
            return train, create_dataset(validation_folder, tokenizer, clean, demo_split="heldout", flag=flag)
        except UserError as error:
            raise UserError(str(error).replace("--input-folder", "--validation-folder")) from error
    if isinstance(train, DemoDataset):
        return train, create_dataset(DEMO, tokenizer, clean, demo_split="heldout") if validation_holdout else None
    return train.split(validation_holdout)
