"""Write docs/gallery.md and its pictures in docs/images, sampled from the shipped model.

    python -m docs.make_gallery
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle.completion import completion_codes
from dalle.models import Candidates, Dalle
from dalle.pictures import Cell, labelled_grid, save_picture
from data.demo import demo_records
from sampling import decode_partial, to_uint8
from utils.files import atomic_write

FILE = Path(__file__).resolve().parent / "gallery.md"

KNOWN = (
    "red apple", "grinning cat", "jack-o-lantern", "octopus", "pizza", "rainbow", "wolf", "snowman", "flag: Italy",
    "flag: Japan", "sunflower", "hot dog", "police car", "rocket", "crescent moon", "woman astronaut: dark skin tone",
)  # fmt: skip
UNKNOWN = ("blue apple", "cat with a hat", "two pizzas", "a dog on the beach", "cold fire", "Mona Lisa", "42", "")
BOXES = {"grinning cat": (0, 0.5, 1, 1), "pizza": (0.5, 0, 1, 1), "wolf": (0.25, 0.375, 0.75, 0.625)}
"""What is completed: left, top, right, bottom."""
CANDIDATES = 16
"""Samples of which the likeliest is shown."""
SIZE = 8
"""Pictures in a row."""

class Sheet(NamedTuple):
    """A picture of the page, what stands above it, and the command that samples such pictures."""

    name: str
    title: str
    about: str
    command: str


SHEETS = (
    Sheet("prompts", "Captions",
          "For each caption the likeliest of 16 samples. A tenth of the skin tones was held out: the model saw the "
          "emoji in other tones, and the tone on other emoji.",
          'python generate.py --dalle_path demo --text "octopus|rainbow" --num_images 16 --keep 1'),
    Sheet("unknown", "Captions that it does not know",
          "The model knows the names of emoji and nothing else: it combines what it has seen, or paints what sounds "
          "alike. No choice was made: these are images 0 and up of seed 0.",
          'python generate.py --dalle_path demo --text "blue apple" --num_images 4'),
    Sheet("options", "Temperature and likelihood",
          "The same noise at rising temperatures, and every second of 16 samples in the order of their likelihood.",
          'python generate.py --dalle_path demo --text "teddy bear" --temperature 0.5 --num_images 8'),
    Sheet("completion", "Code by code, and completion",
          "What a stream sends while an image is sampled: the codes so far, decoded. Then given pictures, what of them "
          "is kept, and six completions.",
          'python generate.py --dalle_path demo --text "wolf" --image face.png --mask 0,0.5,1,1 --num_images 6'),
)  # fmt: skip


def page() -> str:
    """The content of docs/gallery.md."""
    parts = [
        "# Gallery\nSampled from the shipped model (4.4 M parameters, 64x64 pixels) and written by "
        "`python -m docs.make_gallery`.\nThe model learned from [Twemoji](../README.md#licences) graphics.\n"
    ]
    for sheet in SHEETS:
        picture = f"![{sheet.title}](images/gallery_{sheet.name}.png)"
        parts.append(f"\n## {sheet.title}\n{sheet.about}\n\n{picture}\n\n```bash\n{sheet.command}\n```\n")
    return "".join(parts)


@functools.lru_cache(maxsize=None)
def model() -> Dalle:
    """The shipped model."""
    return Dalle.from_pretrained("demo")


def candidates(prompt: str, count: int, **options: Any) -> Candidates:
    """Sampled with seed 0."""
    return model().generate(prompt, num_candidates=count, seed=0, progress=False, **{"top_k": None, **options})


def cells(images: Tensor, labels: list[str] | None = None) -> list[Cell]:
    """Images (N, 3, S, S) in [0, 1], each with a label."""
    pictures = to_uint8(images).cpu()
    return [Cell([picture], label) for picture, label in zip(pictures, labels or [""] * len(pictures))]


def likeliest(prompts: list[str]) -> list[Cell]:
    """The likeliest image of each prompt."""
    return [cells(candidates(prompt, CANDIDATES).best(1).images, [prompt])[0] for prompt in prompts]


def held_out() -> list[str]:
    """A row of the captions that the model was not trained on, evenly chosen among those that fit below a picture."""
    captions = sorted(record.caption for record in demo_records("heldout") if len(record.caption) <= 32)
    return captions[:: len(captions) // SIZE][:SIZE]


def prompts() -> list[tuple[str, list[Cell]]]:
    """What it knows, and what it has to combine."""
    return [("Seen in training", likeliest(list(KNOWN))), ("Held out", likeliest(held_out()))]


def unknown() -> list[tuple[str, list[Cell]]]:
    """Captions of other words, and none at all."""
    return [("", [cell for prompt in UNKNOWN for cell in cells(candidates(prompt, 1).images, [prompt or "(nothing)"])])]


def options() -> list[tuple[str, list[Cell]]]:
    """One prompt at several temperatures, and ranked."""
    rows = []
    for temperature in (0.5, 1.0, 1.5):
        found = candidates("teddy bear", SIZE, softmax_temperature=temperature)
        rows.append((f"teddy bear, temperature {temperature:g}", cells(found.images)))
    found = candidates("owl", 2 * SIZE).best(2 * SIZE)
    labels = [f"{value:.1f} nats" for value in found.log_likelihood.tolist()]
    return [*rows, ("owl, by likelihood", cells(found.images, labels)[::2])]


def completion() -> list[tuple[str, list[Cell]]]:
    """An image while it is sampled, and pictures that are completed."""
    rows = []
    for prompt in ("jack-o-lantern", "octopus"):
        codes = candidates(prompt, CANDIDATES).best(1).codes
        count = codes.shape[1]
        steps = [count * step // (SIZE - 1) for step in range(SIZE)]
        partial = torch.stack([codes[0].where(torch.arange(count) < step, torch.tensor(-1)) for step in steps])
        pictures = decode_partial(model().loaded, partial)[:, :3]
        labels = [f"{step} of {count} codes" for step in steps]
        rows.append((prompt, [Cell([picture], label) for picture, label in zip(pictures, labels)]))
    for prompt, box in BOXES.items():
        first = candidates(prompt, CANDIDATES).best(1)
        picture = to_uint8(first.images).cpu()[0]
        codes = completion_codes(model().loaded, picture, box)
        found = candidates(prompt, max(SIZE - 2, 1), image=picture, mask=box)
        kept = decode_partial(model().loaded, codes[None])[0, :3]
        rows.append((f"{prompt}, completed", [Cell([picture], "given"), Cell([kept], "kept"), *cells(found.images)]))
    return rows


def main() -> None:
    """Write the page and its pictures."""
    for sheet in SHEETS:
        sections = {"prompts": prompts, "unknown": unknown, "options": options, "completion": completion}[sheet.name]()
        save_picture(labelled_grid(sections, columns=SIZE), FILE.parent / "images" / f"gallery_{sheet.name}.png")
    with atomic_write(FILE) as file:
        file.write(page())


if __name__ == "__main__":
    main()
