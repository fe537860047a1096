"""Where the images of a run go, in one of three layouts, and which of them are there already.

    folders   <outputs folder>/<prompt with _ for spaces>/0.jpg, 1.jpg, ..., caption.txt, grid.png, generation.json
    flat      <outputs folder>/000000-0000.jpg (prompt, image), ..., generation.jsonl, generation.json
    tar       <outputs folder>/00000.tar, ... (webdataset: image, .txt, .json), generation.jsonl, generation.json

Image `number` of a run is num_images * prompt + image. Images are completed in groups, those of a prompt or of a shard.
Several processes add to a group: each writes files of images and a journal; who adds the last image merges them.
What files and journals hold when a run is interrupted is what --resume keeps. Earlier images of a prompt's folder are
replaced when the first new one is ready; files that no generation.json lists are never deleted, only reported.
"""
from __future__ import annotations

import collections
import contextlib
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

from dalle.journal import Journal, Record, rank
from dalle.pictures import FORMATS, save_picture, to_pil
from dalle.prompt_folders import CANNOT
from models.quantization import DTYPES
from sampling import Batch
from utils.errors import UsageError, UserError
from utils.files import writing
from utils.locks import Lock
from utils.options import Options, flag_name, option
from utils.processes import Processes
from utils.resume import changes, refuse

GRID = "grid.png"
_FREE = ("batch_size", "parallel", "prime_image", "image", "mask", "prime_rows")
"""Settings that an interrupted run may be resumed with other values of: `given` says what images keep of a picture."""
_PARTS = {"checkpoint": "--dalle-path", "vqgan": "--vqgan-model-path", "tokenizer": "--bpe-path"}
_DIGESTS = {"given_sha256": "--image or --prime-image", "prompts_sha256": "--text or --prompts-file"}
_MOST_LOCKS = 64
_WRITERS = 8
"""Images that are written at the same time."""


@dataclass(frozen=True)
class ResultOptions(Options, title="results"):
    """How many images to generate, which ones to keep, and where."""

    num_images: int = option(128, "images per caption", ge=1, le=10**6)
    clip_path: str | None = option(None, "rank the images by CLIP similarity to their caption: folder or name of a "
                                   "CLIP model of transformers", path=True, metavar="DIR|NAME")
    keep: int | None = option(None, "write only the best N of --num-images: by --clip-path, else by likelihood", ge=1,
                              none="all")
    outputs_dir: str = option("./outputs", "folder for the captions' folders", path=True)
    layout: str = option("folders", "folders: one for each caption; flat: one folder of images; tar: webdataset shards",
                         choices=("folders", "flat", "tar"))
    images_per_shard: int = option(1000, "images in a shard of --layout tar", ge=1, le=10**6)
    resume: bool = option(False, "continue an interrupted run with the same options: images that are there are kept")
    format: str = option("jpg", "image format", choices=FORMATS)
    dtype: str = option("float32", "dtype of the transformer's weights: bfloat16 takes half the memory, int8 a "
                        "quarter", choices=DTYPES)
    cuda_graphs: str = option("auto", "off: on a GPU, launch kernels step by step instead of replaying CUDA graphs",
                              choices=("auto", "off"))


class Caption(NamedTuple):
    """A prompt and its token ids."""

    prompt: str
    """As given."""
    text: str
    """The prompt, or its completion with --gentxt."""
    ids: list[int]
    """Token ids, at most T."""


class Outputs:
    """What the layouts have in common. All processes of a run have one, and call the same methods in the same order.

        outputs.check(about)                     # before anything is sampled
        numbers = outputs.missing()
        processes.barrier("read")                # from here on files change
        outputs.begin(captions)
        outputs.add(batch, clip_scores, notes)   # in any process
        outputs.end(notes)                       # when all images are added
    """

    group_size: int
    """Images of a group, but perhaps the last."""

    def __init__(self, prompts: Sequence[str], options: ResultOptions, processes: Processes) -> None:
        """Raises UserError where the layout cannot be written."""
        self.folder, self.prompts, self.options, self.processes = Path(options.outputs_dir), prompts, options, processes
        self.ranked = options.keep is not None or options.clip_path is not None
        self.about: dict[str, Any] = {}
        self.captions: Sequence[Caption] = ()
        self.total = len(prompts) * options.num_images
        self.kept: collections.Counter[int] = collections.Counter()
        """Images of each group that an interrupted run has left."""
        self.finished: set[int] = set()
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._journals: dict[int, Journal] = {}
        self._best: dict[int, list[Record]] = {}  # by prompt, if they are ranked
        self._locks: collections.OrderedDict[int, Lock] = collections.OrderedDict()

    # What each layout says

    def _saved(self) -> Any:
        """Yield (path, what an interrupted or earlier run of the same prompts says of itself)."""
        raise NotImplementedError

    def _is_finished(self, group: int) -> bool:
        """Whether nothing is left to be done for a group."""
        raise NotImplementedError

    def _start(self, group: int) -> None:
        """Prepare a group for its first new image."""
        raise NotImplementedError

    def _merge(self, group: int, records: Sequence[Record], notes: dict[str, Any]) -> None:
        """Complete a group, whose images these are, in their order: may be repeated if it was interrupted."""
        raise NotImplementedError

    def _journal_of(self, group: int) -> Journal:
        raise NotImplementedError

    def image_path(self, number: int) -> Path:
        """Where an image is until its group is complete; in `folders` and `flat` mostly for good."""
        raise NotImplementedError

    def begin(self, captions: Sequence[Caption]) -> None:
        """Now images come. Completes groups whose images were all there."""
        self.captions = captions
        groups = [group for group in self.kept if self.kept[group] == len(self.numbers(group))]
        left = [group for group in groups if group not in self.finished]
        for place in self.processes.share("left", len(left)):
            self._finish(left[place], {})

    def end(self, notes: dict[str, Any]) -> None:
        """All images are there. notes: what else to say of the run."""

    def close(self) -> None:
        """Let go of everything, also after an error."""
        self._pool.shutdown()
        for lock in self._locks.values():
            lock.close()

    # Before sampling

    def check(self, about: dict[str, Any]) -> None:
        """Raise UsageError if a run to be resumed had other settings. about: of this run, or a part of it."""
        self.about = about
        for path, saved in self._saved() if self.options.resume else ():
            way_out = "start without --resume, into another --outputs-dir"
            refuse(changes(_identity(saved), _identity(about)), _identity(about), str, path, way_out)

    def missing(self) -> Tensor:
        """The numbers of the images to be sampled, LongTensor: those that are not there."""
        wanted = torch.ones(self.total, dtype=torch.bool)
        for group in range(-(-self.total // self.group_size)) if self.options.resume else ():
            numbers = self.numbers(group)
            if self._is_finished(group):
                self.finished.add(group)
                self.kept[group] = len(numbers)
                wanted[numbers.start : numbers.stop] = False
                continue
            records = self._journal_of(group).read()
            there = [number for number in records if self.image_path(number).is_file()]
            if self.ranked:  # candidates that are not among the best have no file
                lost = {record["number"] for record in self._chosen(records)} - set(there)
                there = [number for number in records if number not in lost]
                for number in there:
                    self._note_best(records[number])
            self.kept[group] = len(there)
            wanted[there] = False
        return wanted.nonzero()[:, 0]

    def numbers(self, group: int) -> range:
        """The images of a group."""
        return range(group * self.group_size, min((group + 1) * self.group_size, self.total))

    # While sampling

    def add(self, batch: Batch, clip_scores: Sequence[float] | None, notes: dict[str, Any]) -> None:
        """Write the images of a batch, and complete the groups that lacked only these.

        notes: what the files say of the run as far as it is.
        """
        num_images, counts = self.options.num_images, collections.Counter[int]()
        rows = zip(*batch.share, batch.seeds, batch.codes.tolist(), batch.log_likelihood.tolist())
        records = []
        for row, (prompt, image, seed, codes, likelihood) in enumerate(rows):
            number = prompt * num_images + image
            record: Record = {"number": number, "file": self.image_path(number).name, "seed": seed, "codes": codes}
            record["log_likelihood"] = _finite(likelihood)
            if clip_scores is not None:
                record["clip_score"] = _finite(clip_scores[row])
            records.append(record)
            counts[number // self.group_size] += 1
        for group in counts:
            if group not in self._journals:
                self.processes.once(f"start {group}", functools.partial(self._start, group))
                self._journals[group] = self._journal_of(group)
        with writing(CANNOT, self.folder):
            self._write(records, batch.pixels)
            for group in counts:
                self._journals[group].sync()
        for group, count in counts.items():
            if self.processes.add(f"group {group}", count) + self.kept[group] == len(self.numbers(group)):
                self._finish(group, notes)

    def _write(self, records: Sequence[Record], pixels: Tensor) -> None:
        """Write images, several at a time because each waits for the disk, and then a line for each."""
        beaten = {number for record in records for number in self._note_best(record)} if self.ranked else set()
        wanted = [place for place, record in enumerate(records) if record["number"] not in beaten]

        def save(place: int) -> None:
            save_picture(to_pil(pixels[place]), self.image_path(records[place]["number"]))

        saved = self._pool.map(save, wanted)
        for record in records:
            if record["number"] not in beaten:
                next(saved)
            self._journals[record["number"] // self.group_size].append(record)
        for number in beaten - {record["number"] for record in records}:
            with contextlib.suppress(FileNotFoundError):
                self.image_path(number).unlink()

    def _note_best(self, record: Record) -> list[int]:
        """Take a candidate among the best of its prompt that are known here; return which one is not any more, if any.
        """
        best = self._best.setdefault(record["number"] // self.options.num_images, [])
        best.append(dict(record, codes=None))
        best.sort(key=rank)
        return [best.pop()["number"]] if len(best) > (self.options.keep or self.options.num_images) else []

    def _chosen(self, records: dict[int, Record]) -> list[Record]:
        """The images to keep of those of a group, in the order of their files."""
        if not self.ranked:
            return list(records.values())
        by_prompt: dict[int, list[Record]] = {}
        for record in records.values():
            by_prompt.setdefault(record["number"] // self.options.num_images, []).append(record)
        return [record for own in by_prompt.values() for record in sorted(own, key=rank)[: self.options.keep]]

    def _finish(self, group: int, notes: dict[str, Any]) -> None:
        journal = self._journals.pop(group, None) or self._journal_of(group)
        numbers = self.numbers(group)
        with writing(CANNOT, self.folder):
            records = journal.read()
            if len(records) < len(numbers):
                raise self._changed()
            self._merge(group, self._chosen(records), notes)
            journal.remove()
        for prompt in range(numbers.start // self.options.num_images, -(-numbers.stop // self.options.num_images)):
            self._best.pop(prompt, None)
        if group in self._locks:
            self._locks.pop(group).close()

    def _changed(self) -> UserError:
        return UserError(f"--outputs-dir {self.folder}: another run has changed it meanwhile; give --resume again")

    def _hold(self, group: int, lock: Lock) -> None:
        """Hold a lock until the group is complete; where another process completes it, it is one of the last."""
        self._locks[group] = lock
        while self.processes.size > 1 and len(self._locks) > _MOST_LOCKS:
            self._locks.popitem(last=False)[1].close()

    def entry(self, record: Record, file: str) -> dict[str, Any]:
        """What generation.json or generation.jsonl says of an image."""
        num_images, note = self.options.num_images, {}
        if self.ranked:
            note["candidate"] = record["number"] % num_images
        if "clip_score" in record:
            note["clip_score"] = record["clip_score"]
        return dict(note, file=file, **{key: record[key] for key in ("seed", "codes", "log_likelihood")})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for the same images, by the flag that sets it. about: as a report says it."""
    settings = about.get("settings")
    found = {flag_name(name): value for name, value in dict(settings or {}).items() if name not in _FREE}
    digests = {flag: about[key].get("sha256") for key, flag in _PARTS.items() if isinstance(about.get(key), dict)}
    digests.update({flag: about[key] for key, flag in _DIGESTS.items() if key in about})
    found.update({flag: f"of sha256 {str(digest)[:12]}..." for flag, digest in digests.items()})
    found.update({key: about[key] for key in ("sampler",) if key in about})
    return found


def refuse_layout(folder: Path, saved: dict[str, Any], layout: str) -> None:
    """Raise UsageError if a run in another layout is to be resumed."""
    if saved.get("layout", layout) != layout:
        raise UsageError(
            f"--resume: {folder} was written with --layout {saved['layout']}, not {layout}; resume with that, or "
            "choose another --outputs-dir"
        )
