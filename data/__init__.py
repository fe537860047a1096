"""Text-image pairs: COCO-style folders, webdataset shards and the built-in demo set, as data sets of tensors."""
from __future__ import annotations

from data.code_cache import CodeCache, Team
from data.create import DEMO, DataSettings, create_dataset, create_datasets
from data.datasets import CodesDataset, DemoDataset, ImageTextFolder, PairDataset, TextSettings
from data.generated import GeneratedDataset
from data.order import epoch_order, split_holdout
from data.shards import require_folder

__all__ = [
    "DEMO",
    "CodeCache",
    "CodesDataset",
    "DataSettings",
    "DemoDataset",
    "GeneratedDataset",
    "ImageTextFolder",
    "PairDataset",
    "Team",
    "TextSettings",
    "create_dataset",
    "create_datasets",
    "epoch_order",
    "require_folder",
    "split_holdout",
]
