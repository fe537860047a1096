"""The layouts of outputs: a folder for each prompt, one folder of images, or tar shards."""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from dalle.journal import Journal, Record, records_in
from dalle.outputs import GRID, Caption, Outputs, ResultOptions, refuse_layout
from dalle.pictures import FORMATS, GRID_LIMIT, make_grid, save_picture
from dalle.prompt_folders import CANNOT, REPORT, lock_folder, prompt_folders, read_report
from data.images import load_image
from utils.errors import UserError
from utils.files import atomic_write, writing
from utils.processes import Processes

logger = logging.getLogger(__name__)

LINES = "generation.jsonl"
_IMAGE_NAME = re.compile(rf"[0-9]{{1,9}}\.(?:{'|'.join(FORMATS)})")
_STAGED = ".candidate-"
_UNFINISHED = f".*.{'[0-9a-f]' * 16}.tmp"
"""Files of `atomic_write`."""
_PER_GROUP = 1000


def open_outputs(prompts: Sequence[str], options: ResultOptions, processes: Processes) -> Outputs:
    """The outputs of a run in the layout of --layout. Raises UserError where it cannot be written."""
    return LAYOUTS[options.layout](prompts, options, processes)


class Folders(Outputs):
    """A folder for each prompt."""

    def __init__(self, prompts: Sequence[str], options: ResultOptions, processes: Processes) -> None:
        super().__init__(prompts, options, processes)
        self.group_size = options.num_images
        self.paths = prompt_folders(self.folder, prompts)
        if options.resume:
            refuse_layout(self.folder, read_report(self.folder), "folders")

    def _saved(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        return ((path, read_report(path)) for path in self.paths)

    def _is_finished(self, group: int) -> bool:
        report = read_report(self.paths[group])
        return report.get("complete") is True and not _lost(self.paths[group], report.get("images"))

    def _journal_of(self, group: int) -> Journal:
        return Journal(self.paths[group], self.numbers(group))

    def image_path(self, number: int) -> Path:
        prompt, image = divmod(number, self.options.num_images)
        return self.paths[prompt] / f"{_STAGED if self.ranked else ''}{image}.{self.options.format}"

    def begin(self, captions: Sequence[Caption]) -> None:
        for group in self.finished if self.processes.is_first else ():  # perhaps the run was killed at its very end
            self._journal_of(group).remove()
            for staged in self.paths[group].glob(f"{_STAGED}*"):
                staged.unlink()
        super().begin(captions)

    def _start(self, group: int) -> None:
        path = self.paths[group]
        self._hold(group, lock_folder(path))
        if self.kept[group]:
            return
        with writing(CANNOT, path):
            for name in _listed(path):
                with contextlib.suppress(FileNotFoundError):
                    (path / name).unlink()
            unlisted = sorted(found.name for found in path.iterdir() if _IMAGE_NAME.fullmatch(found.name))
            if unlisted:
                logger.warning(
                    "%s already has %s that no %s lists: kept unless a new image has the same name",
                    path,
                    unlisted[0] if len(unlisted) == 1 else f"{len(unlisted)} images",
                    REPORT,
                )
            with atomic_write(path / "caption.txt") as file:
                file.write(_writable(self.captions[group].text) + "\n")
            self._report(group, [], complete=False)

    def _merge(self, group: int, records: Sequence[Record], notes: dict[str, Any]) -> None:
        path, entries, shown = self.paths[group], [], []
        for place, record in enumerate(records):
            name = f"{place if self.ranked else record['number'] % self.options.num_images}.{self.options.format}"
            if self.ranked:
                _copy(self.image_path(record["number"]), path / name)
            if place < GRID_LIMIT:
                shown.append(load_image(str(path / name), None))
            entries.append(self.entry(record, name))
        save_picture(make_grid(shown, self.prompts[group]), path / GRID)
        self._report(group, entries, complete=True, **notes)
        for leftover in (*path.glob(f"{_STAGED}*"), *path.glob(_UNFINISHED)):  # of killed processes
            with contextlib.suppress(FileNotFoundError):
                leftover.unlink()
        logger.info("%s: %d image%s", path, len(entries), "s" if len(entries) > 1 else "")

    def _report(self, group: int, images: Sequence[dict[str, Any]], complete: bool, **notes: Any) -> None:
        caption = self.captions[group]
        about = dict(caption=caption.text, text_tokens=caption.ids, **self.about, **notes)
        head = dict({"prompt": caption.prompt, "complete": complete}, **about)
        _write_report(self.paths[group] / REPORT, head, images)

    def close(self) -> None:
        """Also reports the images of folders that are not complete, where this process alone writes them."""
        for group in self._locks if self.processes.size == 1 else ():
            with contextlib.suppress(OSError):
                records = [] if self.ranked else self._journal_of(group).read().values()
                images = [self.entry(record, self.image_path(record["number"]).name) for record in records]
                self._report(group, images, complete=False)
        super().close()


class Flat(Outputs):
    """One folder of images, and a list of them."""

    layout = "flat"
    _ours = re.compile(rf"[0-9]{{6,}}-[0-9]{{4,}}\.(?:{'|'.join(FORMATS)})")

    def __init__(self, prompts: Sequence[str], options: ResultOptions, processes: Processes) -> None:
        super().__init__(prompts, options, processes)
        self.group_size = self._per_group()
        if self.ranked:  # whole prompts
            kept = options.keep or options.num_images
            self.group_size = max(1, self.group_size // kept) * options.num_images
        self._state = self.folder / ".generation"
        self._header = read_report(self.folder)
        if options.resume and "layout" in self._header:
            refuse_layout(self.folder, self._header, self.layout)
            lost = _lost(self.folder, _read_lines(self.folder / LINES)) if self._header.get("complete") is True else ""
            if lost:
                raise UserError(
                    f"--resume: {self.folder} was complete, but lacks {lost}: restore it, or start without --resume, "
                    "into another --outputs-dir"
                )
        elif self.folder.is_dir():
            earlier = sorted(name for name in os.listdir(str(self.folder)) if self._ours.fullmatch(name))
            if "layout" in self._header:
                raise UserError(
                    f"--outputs-dir {self.folder} holds the images of an earlier run: --resume continues it; or "
                    "choose another folder, or delete this one"
                )
            if earlier:
                raise UserError(
                    f"--outputs-dir {self.folder} holds {earlier[0]}, which no {REPORT} lists and this run would "
                    "replace: choose another folder"
                )

    def _per_group(self) -> int:
        return _PER_GROUP

    def _saved(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        return iter([(self.folder, self._header)])

    def check(self, about: dict[str, Any]) -> None:
        super().check(dict(about, prompts_sha256=hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()))

    def _lines(self, group: int) -> Path:
        return self._state / f"{group:05}.jsonl"

    def _is_finished(self, group: int) -> bool:
        if self._header.get("complete") is True:
            return True
        return not _lost(self.folder, _read_lines(self._lines(group)))

    def _journal_of(self, group: int) -> Journal:
        return Journal(self._state, self.numbers(group), f"{group:05}")

    def _name(self, number: int, place: int | None = None) -> str:
        """place: among the best of the prompt."""
        prompt, image = divmod(number, self.options.num_images)
        return f"{prompt:06}-{image if place is None else place:04}.{self.options.format}"

    def image_path(self, number: int) -> Path:
        return (self._state if self.ranked else self.folder) / self._name(number)

    def begin(self, captions: Sequence[Caption]) -> None:
        if self.processes.is_first:
            self._hold(-1, lock_folder(self.folder))
            if read_report(self.folder) != self._header:
                raise self._changed()
            if self._header.get("complete"):
                shutil.rmtree(str(self._state), ignore_errors=True)  # perhaps the run was killed at its very end
            else:
                with writing(CANNOT, self.folder):
                    for unfinished in self.folder.glob(_UNFINISHED):  # a killed process was writing them
                        unfinished.unlink()
                    self._state.mkdir(exist_ok=True)
                    self._write_header(complete=False)
        self.processes.barrier("begun")
        super().begin(captions)

    def _start(self, group: int) -> None:
        """Nothing to prepare."""

    def _named(self, records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
        """The records with the names of their files: for ranked ones their place among those of their prompt."""
        place, before = 0, -1
        for record in records:
            prompt = record["number"] // self.options.num_images
            place, before = place + 1 if prompt == before else 0, prompt
            yield record, self._name(record["number"], place if self.ranked else None)

    def _merge(self, group: int, records: Sequence[Record], notes: dict[str, Any]) -> None:
        named = list(self._named(records))
        self._write_lines(group, self._place(group, named))
        numbers = self.numbers(group)
        for number in numbers if self.image_path(numbers[0]).parent == self._state else ():
            with contextlib.suppress(FileNotFoundError):
                self.image_path(number).unlink()

    def _place(self, group: int, named: Sequence[tuple[Record, str]]) -> Iterator[dict[str, Any]]:
        """Put the images of a group where they belong; yield a line for each."""
        for record, name in named:
            if self.ranked:
                _copy(self.image_path(record["number"]), self.folder / name)
            yield self.line(record, name)

    def line(self, record: Record, file: str) -> dict[str, Any]:
        """The line of an image in generation.jsonl."""
        prompt = record["number"] // self.options.num_images
        caption, entry = self.captions[prompt], self.entry(record, file)
        about = {"file": entry.pop("file"), "prompt_number": prompt, "prompt": caption.prompt}
        if caption.text != caption.prompt:
            about["completed"] = caption.text
        return dict(about, **entry)

    def _write_lines(self, group: int, lines: Iterable[dict[str, Any]]) -> None:
        with atomic_write(self._lines(group)) as file:
            for line in lines:
                file.write(json.dumps(line) + "\n")

    def end(self, notes: dict[str, Any]) -> None:
        if not self.processes.is_first or self._header.get("complete"):
            return
        with writing(CANNOT, self.folder):
            with atomic_write(self.folder / LINES) as file:
                for group in range(-(-self.total // self.group_size)):
                    file.write(self._lines(group).read_text(encoding="utf-8"))
            self._write_header(complete=True, **notes)
            shutil.rmtree(str(self._state))
        count = len(self.prompts) * (self.options.keep or self.options.num_images)
        logger.info("%s: %d image%s", self.folder, count, "s" if count > 1 else "")

    def _write_header(self, complete: bool, **notes: Any) -> None:
        head = {"complete": complete, "layout": self.layout, "num_prompts": len(self.prompts)}
        _write_report(self.folder / REPORT, dict(head, **self.about, **notes))


class Tar(Flat):
    """Shards in webdataset's form."""

    layout = "tar"
    _ours = re.compile(r"[0-9]{5,}\.tar")

    def _per_group(self) -> int:
        return self.options.images_per_shard

    def image_path(self, number: int) -> Path:
        return self._state / self._name(number)

    def _place(self, group: int, named: Sequence[tuple[Record, str]]) -> Iterator[dict[str, Any]]:
        shard, lines = f"{group:05}.tar", []
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(atomic_write(self.folder / shard, "wb"))
            archive = opened.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT))
            for record, name in named:
                line, key = self.line(record, name), name.partition(".")[0]
                caption = " ".join(self.captions[line["prompt_number"]].text.split())
                _add(archive, name, self.image_path(record["number"]).read_bytes())
                _add(archive, f"{key}.txt", caption.encode("utf-8"))
                _add(archive, f"{key}.json", json.dumps(line).encode("ascii"))
                lines.append(dict(line, file=f"{shard}/{name}"))
        return iter(lines)


LAYOUTS = {"folders": Folders, "flat": Flat, "tar": Tar}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member. Nothing but name and content decides its bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _read_lines(file: Path) -> list[Any] | None:
    """The lines of a list of images; None if it cannot be read."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return None


def _lost(folder: Path, images: Any) -> str:
    """A file of these images, or their shard, that is not there; "" if all are. images: entries of a report."""
    if not isinstance(images, list) or not all(isinstance(image, dict) and image.get("file") for image in images):
        return f"a list of its images ({LINES})"
    files = dict.fromkeys(str(image["file"]).partition("/")[0] for image in images)
    return next((file for file in files if not (folder / file).is_file()), "")


def _copy(source: Path, target: Path) -> None:
    content = source.read_bytes()
    with atomic_write(target, "wb") as file:
        file.write(content)


def _write_report(path: Path, head: dict[str, Any], images: Sequence[dict[str, Any]] | None = None) -> None:
    # One line per key and per image: json's indent would give each code its own line.
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    if images is not None:
        lines.append('  "images": [\n{}\n  ]'.format(",\n".join("    " + json.dumps(image) for image in images)))
    with atomic_write(path) as file:
        file.write(_writable("{\n" + ",\n".join(lines) + "\n}\n"))


def _writable(text: str) -> str:
    """Escape lone surrogates (undecodable bytes of a path), which UTF-8 lacks, as JSON does: \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _listed(folder: Path) -> Iterator[str]:
    """Files of an earlier run that the new one replaces."""
    images = read_report(folder).get("images")
    listed = images if isinstance(images, list) else []
    for path in folder.glob(".part-*.jsonl"):
        listed += records_in(path)
        yield path.name
    yield from (path.name for path in folder.glob(f"{_STAGED}*"))
    for image in listed:
        name = image.get("file") if isinstance(image, dict) else None
        if isinstance(name, str) and _IMAGE_NAME.fullmatch(name):
            yield name
    if images is not None:
        yield GRID
        yield REPORT
