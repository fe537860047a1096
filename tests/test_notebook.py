"""The sampling notebook: its controls and ranking in this process, and the notebook itself in a kernel, clicked."""
from __future__ import annotations

import io
import json
import sys
from unittest import mock

import pytest
import torch
from helpers import ROOT, Brightness, refused
from PIL import Image

from dalle import notebook
from dalle.models import Candidates, Dalle
from dalle.notebook import Gallery, Ranking, rank, ranked_sheet
from sampling.partial import BLANK
from utils.errors import UserError

NOTEBOOK = ROOT / "examples" / "sampling_interactive_demo.ipynb"


@pytest.fixture(scope="module")
def model(mindalle_folder):
    return Dalle.from_pretrained(mindalle_folder)


@pytest.fixture
def gallery(model):
    pytest.importorskip("ipywidgets", reason="the notebook's controls need ipywidgets")
    return Gallery(model, prompt="red apple", num_candidates=3)


def candidates():
    """Four images of one colour each, the brighter the less likely."""
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0] = torch.tensor([0.2, 0.9, 0.4, 0.6])[:, None, None]
    return Candidates(images, torch.zeros(4, 10, dtype=torch.long), torch.tensor([-10.0, -90.0, -20.0, -55.0]))


def test_likelihood_or_clip_orders_the_images():
    ranking = rank("red", candidates())
    assert ranking.order == [0, 2, 3, 1]
    assert ranking.labels == ["1. -1.00", "2. -2.00", "3. -5.50", "4. -9.00"] and "likelihood" in ranking.by
    ranking = rank("red", candidates(), Brightness())
    assert ranking.order == [1, 3, 2, 0] and "CLIP" in ranking.by and ranking.labels[0] == "1. 0.301"


@pytest.mark.parametrize("columns, places", [(0, (2, 2)), (4, (4, 1)), (3, (3, 2))])
def test_the_sheet_shows_the_best_first(columns, places):
    ranking = rank("red", candidates())
    sheet = ranked_sheet(candidates().images, ranking, columns)
    across, down = sheet.width / places[0], sheet.height / places[1]
    for place, index in enumerate(ranking.order):
        middle = (int((place % places[0] + 0.5) * across), int((place // places[0] + 0.4) * down))
        assert sheet.getpixel(middle) == (int([0.2, 0.9, 0.4, 0.6][index] * 255 + 0.5), 0, 0)
    # Large images keep their size.
    sheet = ranked_sheet(torch.rand(1, 3, 200, 200), Ranking([0], ["1. x"], "x"))
    assert 200 <= sheet.width < 230 and 200 <= sheet.height < 250


def test_a_click_draws_what_the_controls_say(gallery, model):
    values = {"num_candidates": 2, "top_k": 0, "top_p": 0.9, "softmax_temperature": 0.7, "seed": 5, "cond_scale": 1.5}
    for name, value in values.items():
        gallery.controls[name].value = value
    fractions, busy, sheets = [], [], []
    gallery.picture.observe(lambda change: sheets.append(change["new"]), "value")
    gallery.bar.observe(lambda change: fractions.append(gallery.bar.value / gallery.bar.max), "value")
    gallery.button.observe(lambda change: busy.append(change["new"]), "disabled")
    assert gallery.picture.layout.display == "none"
    gallery.button.click()
    assert busy == [True, False] and gallery.picture.layout.display is None
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(fractions) == 16
    # Partial images of ever more codes, then the ranked ones.
    *partial, last = [Image.open(io.BytesIO(sheet)).convert("RGB") for sheet in sheets]
    blank = [sheet.tobytes().count(bytes([BLANK] * 24)) for sheet in partial]
    assert 4 <= len(partial) <= notebook.PREVIEWS and blank == sorted(set(blank), reverse=True)
    assert {sheet.size for sheet in partial} == {last.size}
    expected = model.generate("red apple", **dict(values, top_k=None), progress=False)
    assert torch.equal(gallery.generated.codes, expected.codes)
    shown = Image.open(io.BytesIO(gallery.picture.value))
    assert shown.convert("RGB").tobytes() == ranked_sheet(expected.images, rank("red apple", expected)).tobytes()
    assert gallery.status.value == "2 images, ordered by likelihood (nats per code), the best first"


def test_the_controls_keep_to_what_the_model_takes(gallery, model):
    for name, widget in gallery.controls.items():
        for limit in {getattr(widget, "min", None), getattr(widget, "max", None)} - {None}:
            settings = dict(gallery.settings(), num_candidates=1, **({} if name == "num_candidates" else {name: limit}))
            settings["top_k"] = settings["top_k"] or None
            model.generate(**settings, progress=False)


def test_an_error_is_shown_and_the_button_works_again(gallery, monkeypatch):
    monkeypatch.setattr(type(gallery.model), "generate", mock.Mock(side_effect=UserError("not enough memory")))
    gallery.button.click()
    assert gallery.status.value == "error: not enough memory" and not gallery.button.disabled
    assert gallery.generated is None


def test_clip_orders_where_it_is_given(gallery, model, monkeypatch):
    monkeypatch.setattr(notebook, "ClipRanker", Brightness)
    ranked = Gallery(model, clip="some/folder", prompt="red apple", num_candidates=3)
    ranked.generate()
    assert ranked.ranker.path == "some/folder" and "CLIP" in ranked.status.value
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    refused("python -m pip install ipywidgets", Gallery, model)


def test_the_notebook_is_small_and_shows_a_gallery():
    text = NOTEBOOK.read_text(encoding="utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", ())]
    assert {"image/jpeg", "image/png"} & {kind for output in outputs for kind in output.get("data", {})}
    assert len(text) < 300_000 and "/home/" not in text and "Error" not in text


def test_the_notebook_runs_and_its_button_draws():
    """From a fresh kernel in the notebook's own folder, as a user has it, with fewer candidates."""
    packages = ("nbformat", "nbclient", "ipykernel", "ipywidgets")
    nbformat, nbclient, *_ = (pytest.importorskip(name, reason="see requirements-dev.txt") for name in packages)
    document = nbformat.read(str(NOTEBOOK), as_version=4)
    first = next(cell for cell in document.cells if cell.cell_type == "code")
    assert "num_candidates=16" in first.source
    first.source = first.source.replace("num_candidates=16", "num_candidates=2")
    click = """
import json
import sys
gallery.controls["seed"].value = 7
before, moves = gallery.picture.value, []
gallery.bar.observe(lambda change: moves.append(gallery.bar.value), "value")
gallery.button.click()
print(json.dumps([len(moves), before != gallery.picture.value, gallery.status.value, len(gallery.picture.value)]))
"""
    document.cells.append(nbformat.v4.new_code_cell(click))
    for cell in document.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(document, timeout=120, kernel_name="python3", resources=resources).execute()
    panel, sheet, best, clicked = [cell.outputs for cell in document.cells if cell.cell_type == "code"]
    assert "application/vnd.jupyter.widget-view+json" in panel[-1]["data"]
    assert "image/png" in sheet[-1]["data"] and "image/png" in best[-1]["data"]
    moves, changed, status, size = json.loads("".join(output["text"] for output in clicked))
    assert moves >= 64 and changed and status.startswith("2 images, ordered by likelihood") and size > 1000
