"""minDALL-E's published model, downloaded once, and the files of its layout.

    <folder>/config.yaml, stage1_last.ckpt (the VQGAN), stage2_last.ckpt (the transformer),
    <folder>/tokenizer/bpe-16k-vocab.json, bpe-16k-merges.txt

The published weights are licensed CC-BY-NC-SA 4.0: not for commercial use.
"""
from __future__ import annotations

import logging
from pathlib import Path

from checkpoints import mindalle
from utils.caches import cache_folder
from utils.downloads import download
from utils.files import PathLike
from utils.tarballs import unpack_tar

logger = logging.getLogger(__name__)

STAGE1, STAGE2, TOKENIZER = "stage1_last.ckpt", mindalle.STAGE2, "tokenizer"

#: URL of each published model; the part before the file name is the archive's md5.
PUBLISHED_MODELS = {
    "minDALL-E/1.3B": "https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/"
    "1.3B.tar.gz"
}
_MAX_ARCHIVE_BYTES = 8 << 30  # limit for the 5 GB archive, and for its content


def is_missing(path_or_name: PathLike | None) -> bool:
    """Whether this is the name of a published model that `resolve` would download."""
    return str(path_or_name) in PUBLISHED_MODELS and not resolve(str(path_or_name), fetch=False).is_dir()


def resolve(path_or_name: PathLike, cache_dir: PathLike | None = None, fetch: bool = True) -> Path:
    """Return the folder of a published model, downloaded if needed and `fetch`; any other path unchanged.

    The archive is downloaded to `cache_dir` (default: ~/.cache/minDALL-E), resuming interrupted downloads, checked
    against its md5, unpacked and deleted. Raises UserError when that fails.
    """
    name = str(path_or_name)
    if name not in PUBLISHED_MODELS:
        return Path(path_or_name)
    url = PUBLISHED_MODELS[name]
    folder_name = name.rpartition("/")[2]
    root = Path(cache_dir) if cache_dir else cache_folder("minDALL-E", holding=folder_name)
    folder = root / folder_name
    if not folder.is_dir() and fetch:
        logger.info("%s (about 5 GB, CC-BY-NC-SA 4.0: not for commercial use) -> %s", name, folder)
        archive = download(url, root / url.rpartition("/")[2], md5=url.split("/")[-2], size_limit=_MAX_ARCHIVE_BYTES)
        unpack_tar(archive, folder, _MAX_ARCHIVE_BYTES)
    return folder
