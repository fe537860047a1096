"""Widgets of the sampling notebook: controls, a progress bar, and the images while they are sampled, then in order.

    gallery = Gallery(Dalle.from_pretrained("demo"))
    gallery.panel                 # in a notebook: the controls, with a button to generate images
    gallery.generate()            # the same from code: returns the sheet of images

Needs ipywidgets (python -m pip install ipywidgets notebook).
"""
from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dalle.models import Candidates, Dalle
from dalle.pictures import Cell, labelled_grid, to_pil
from dalle.reranking import ClipRanker
from sampling import SoFar, decode_partial, to_uint8
from utils.errors import UserError
from utils.files import PathLike

MAX_CANDIDATES = 96
"""minDALL-E's default."""
PREVIEWS = 8
"""Sheets of partial images, at most, while images are sampled."""


class Ranking(NamedTuple):
    """The order of images, the best first."""

    order: list[int]
    labels: list[str]
    """The label below each image, in that order."""
    by: str
    """The criterion."""


def rank(prompt: str, generated: Candidates, ranker: ClipRanker | None = None) -> Ranking:
    """Order candidates by CLIP similarity to the prompt, without a ranker by the model's likelihood."""
    if ranker is None:
        # Per code, so that the number does not depend on the image size.
        scores = generated.log_likelihood / generated.codes.shape[1]
        by, label = "likelihood (nats per code)", "{}. {:.2f}"
    else:
        pictures = [to_pil(image) for image in to_uint8(generated.images).cpu()]
        scores, by, label = ranker.similarity(prompt, pictures), "CLIP similarity", "{}. {:.3f}"
    order = scores.argsort(descending=True, stable=True).tolist()
    return Ranking(order, [label.format(place + 1, float(scores[index])) for place, index in enumerate(order)], by)


def ranked_sheet(images: Tensor, ranking: Ranking, columns: int = 0) -> Image.Image:
    """Arrange images (N, 3, S, S) in [0, 1] in a grid, the best first, each with its rank and score below.

    Small images are enlarged. columns 0: about square.
    """
    pictures = to_uint8(images).cpu()
    return _sheet([Cell([pictures[index]], label) for index, label in zip(ranking.order, ranking.labels)], columns)


def _sheet(cells: list[Cell], columns: int = 0) -> Image.Image:
    return labelled_grid([("", cells)], columns=columns or math.ceil(math.sqrt(len(cells))))


def to_png(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


class Gallery:
    """Sampling controls and the generated images, in one panel.

    Attributes: `panel`, the widget to show; `controls`, name -> widget; `button`, `bar`, `status` and `picture`, the
    other widgets; `generated` and `ranking`, the latest result (None before the first).
    """

    def __init__(
        self,
        model: Dalle,
        clip: PathLike | None = None,
        prompt: str = "grinning cat",
        num_candidates: int = 16,
    ) -> None:
        """Build the panel. clip: folder or name of a CLIP model of `transformers`, which then ranks the images.

        Raises UserError if ipywidgets or the CLIP model is missing.
        """
        self.model = model
        self.ranker = None if clip is None else ClipRanker(clip, model.device)
        self.generated: Candidates | None = None
        self.ranking: Ranking | None = None
        widgets = _widgets()
        style, wide = {"description_width": "110px"}, widgets.Layout(width="420px")

        def control(kind: Any, name: str, value: Any, **limits: Any) -> Any:
            return kind(value=value, description=name, style=style, layout=wide, **limits)

        num_codes = model.stage2.config.num_image_tokens
        self.controls = {
            "prompt": control(widgets.Text, "prompt", prompt, continuous_update=False),
            "num_candidates": control(widgets.IntSlider, "candidates", num_candidates, min=1, max=MAX_CANDIDATES),
            "top_k": control(widgets.IntSlider, "top-k (0: all)", min(256, num_codes), min=0, max=num_codes),
            "top_p": control(widgets.FloatSlider, "top-p", 1.0, min=0.05, max=1.0, step=0.05),
            "softmax_temperature": control(widgets.FloatSlider, "temperature", 1.0, min=0.0, max=3.0, step=0.05),
            "seed": control(widgets.BoundedIntText, "seed", 0, min=0, max=2**31 - 1),
            "cond_scale": control(widgets.FloatSlider, "guidance", 1.0, min=0.0, max=10.0, step=0.25),
        }
        self.button = widgets.Button(description="Generate", button_style="primary")
        self.bar = widgets.IntProgress(value=0, min=0, max=1, layout=wide)
        self.status = widgets.Label("guidance: for models trained with dropped captions")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(display="none"))
        self.button.on_click(self._clicked)
        row = widgets.HBox([self.button, self.bar])
        self.panel = widgets.VBox([*self.controls.values(), row, self.status, self.picture])

    def settings(self) -> dict[str, Any]:
        """The values of the controls, as arguments of `Dalle.generate`."""
        values = {name: widget.value for name, widget in self.controls.items()}
        return dict(values, top_k=values["top_k"] or None)

    def generate(self) -> Image.Image:
        """Generate images with the controls' values; return the sheet, which the panel shows too. Raises UserError."""
        settings = self.settings()
        self.bar.value = 0
        self._codes = torch.full((settings["num_candidates"], self.model.stage2.config.image_seq_len), -1)
        self._there = 0
        self.generated = self.model.generate(**settings, progress=self._progress, preview=self._preview)
        self.ranking = rank(settings["prompt"], self.generated, self.ranker)
        sheet = ranked_sheet(self.generated.images, self.ranking)
        self._show(sheet)
        self.status.value = f"{len(self.ranking.order)} images, ordered by {self.ranking.by}, the best first"
        return sheet

    def _progress(self, done: int, total: int) -> None:
        self.bar.max, self.bar.value = total, done

    def _preview(self, first: int, so_far: SoFar) -> None:
        """Show what is there of all candidates, in the order in which they are sampled."""
        codes = so_far().cpu()
        self._codes[first : first + len(codes)] = codes
        there = int((self._codes >= 0).sum())
        if self._codes.numel() > there >= self._there + self._codes.numel() / PREVIEWS:
            self._there = there
            pictures = decode_partial(self.model.loaded, self._codes)[:, :3]
            self._show(_sheet([Cell([picture], "…") for picture in pictures]))

    def _show(self, sheet: Image.Image) -> None:
        self.picture.value, self.picture.layout.display = to_png(sheet), None

    def _clicked(self, _: Any) -> None:
        self.button.disabled, self.status.value = True, "generating"
        try:
            self.generate()
        except UserError as error:  # a notebook has no console
            self.status.value = f"error: {error}"
        except KeyboardInterrupt:
            self.status.value = "interrupted"
        finally:
            self.button.disabled = False


def _widgets() -> Any:
    try:
        import ipywidgets
    except ImportError as error:
        raise UserError("the notebook's controls need ipywidgets: python -m pip install ipywidgets") from error
    return ipywidgets
