"""From the data options to data sets: a folder, shards, the built-in demo set or random data, split for validation."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bpe import warn_of_unknown
from data.classes import list_class_images
from data.datasets import DemoDataset, GeneratedDataset, ImageTextFolder, PairDataset, TextSettings
from data.demo import demo_records
from data.folder import list_pairs
from data.shard_index import Members
from data.shards import ImageTextShards, find_shards, open_shards
from utils.errors import UsageError, UserError
from utils.files import PathLike
from utils.skipped import SkipReport

if TYPE_CHECKING:
    from bpe import Tokenizer

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The name that stands for the built-in set wherever a folder is expected; a folder of this name is "./demo"."""


def create_dataset(  # noqa: PLR0913
    *,
    input_folder: str | None,
    tokenizer: Tokenizer,
    text_seq_len: int,
    image_size: int,
    truncate_captions: bool = False,
    seed: int = 42,
    null_cond_prob: float = 0.0,
    demo_split: str = "all",
    num_generated: int = 0,
    flip: bool = False,
    index_folder: PathLike | None = None,
    shard_images: str | None = None,
    shard_captions: str | None = None,
    max_bad_fraction: float = 0.01,
    skipped_file: PathLike | None = None,
    is_main: bool = True,
    flag: str = "--input-folder",
) -> PairDataset:
    """Return one data set and log what is in it.

    input_folder: a folder, webdataset shards (data/shards.py), or "demo" for the built-in set (of which `demo_split`
        takes "train", "heldout" or "all"). With a vocabulary of classes it is a folder that holds one folder of images
        for each class (see data/classes.py).
    num_generated: more than 0 makes so many random pairs instead; `input_folder` is then not read.
    flip: mirror every other image, see `PairDataset`.
    index_folder: where the indexes of shards are kept; None: `data.shards.default_index_folder()`.
    shard_images, shard_captions: names of members of shards, see `data.shard_index.Members.named`.
    max_bad_fraction, skipped_file, is_main: how many pairs of a folder may be left out, where those are listed, and
    whether this process lists what every process finds: see utils/skipped.py. flag: where the folder comes from.
    The other arguments are those of `TextSettings`; image_size is in pixels.

    Raises UserError for a missing or empty folder, one with too many bad pairs, and for captions that are too long and
    not to be truncated.
    """
    settings = TextSettings(tokenizer, text_seq_len, truncate_captions, seed, null_cond_prob)
    dataset: PairDataset
    if num_generated:
        dataset = GeneratedDataset(num_generated, settings, image_size)
    elif input_folder is None:
        raise UserError("--input-folder: give a folder of images and captions, or 'demo' for the built-in set")
    elif input_folder == DEMO:
        dataset = DemoDataset(demo_records(demo_split), settings, image_size)
    else:
        skipped = SkipReport(skipped_file, max_bad_fraction, f"{flag} {input_folder}", is_main=is_main)
        classes = getattr(tokenizer, "classes", None)
        listing = find_shards(input_folder) if classes is None else None
        if listing is not None:
            members = Members.named(shard_images, shard_captions)
            shards = open_shards(listing, index_folder, skipped, members)
            dataset = ImageTextShards(shards, settings, image_size, skipped)
        else:
            pairs = list_pairs(input_folder, skipped) if classes is None else list_class_images(input_folder, classes)
            dataset = ImageTextFolder(pairs, settings, image_size, skipped)
    if (shard_images or shard_captions) and flag == "--input-folder" and not isinstance(dataset, ImageTextShards):
        raise UsageError("--shard-images and --shard-captions are for webdataset shards, and --input-folder names none")
    dataset.flip, dataset.held_out = flip, isinstance(dataset, DemoDataset) and demo_split == "heldout"
    logger.info("%s", dataset.report())
    dataset.check_captions()
    if not num_generated:
        warn_of_unknown(tokenizer, dataset.some_captions(), f"{flag} {input_folder}")
    return dataset


def create_datasets(  # noqa: PLR0913
    *,
    input_folder: str | None,
    tokenizer: Tokenizer,
    text_seq_len: int,
    image_size: int,
    truncate_captions: bool = False,
    seed: int = 42,
    null_cond_prob: float = 0.0,
    validation_folder: str | None = None,
    validation_holdout: int | float = 0.01,
    num_generated: int = 0,
    flip: bool = False,
    index_folder: PathLike | None = None,
    shard_images: str | None = None,
    shard_captions: str | None = None,
    max_bad_fraction: float = 0.01,
    skipped_file: PathLike | None = None,
    is_main: bool = True,
) -> tuple[PairDataset, PairDataset | None]:
    """Return (training set, validation set or None); arguments as in `create_dataset`.

    The validation set is `validation_folder` where given, else the held-out records of the demo set, else the share
    (float) or number (int) `validation_holdout` of the pairs, drawn by seed; 0 means none. (The demo set's held-out
    records are never trained on, whatever that number.) None of its captions is left out, none of its images mirrored,
    and in epoch 0, at which it stays as long as nobody moves it, its captions are always the same.
    """

    def create(
        folder: str | None,
        null_cond_prob: float = 0.0,
        demo_split: str = "all",
        generated: int = 0,
        flip: bool = False,
        flag: str = "--input-folder",
    ) -> PairDataset:
        return create_dataset(
            input_folder=folder,
            tokenizer=tokenizer,
            text_seq_len=text_seq_len,
            image_size=image_size,
            truncate_captions=truncate_captions,
            seed=seed,
            null_cond_prob=null_cond_prob,
            demo_split=demo_split,
            num_generated=generated,
            flip=flip,
            index_folder=index_folder,
            shard_images=shard_images,
            shard_captions=shard_captions,
            max_bad_fraction=max_bad_fraction,
            skipped_file=skipped_file,
            is_main=is_main,
            flag=flag,
        )

    train = create(input_folder, null_cond_prob, "train", num_generated, flip)
    if validation_folder is not None:
        try:
            return train, create(validation_folder, demo_split="heldout", flag="--validation-folder")
        except UserError as error:
            raise UserError(str(error).replace("--input-folder", "--validation-folder")) from error
    if isinstance(train, DemoDataset):
        return train, create(DEMO, demo_split="heldout") if validation_holdout else None
    return train.split(validation_holdout)
