"""Grids and contact sheets: pictures large enough to look at, each with what it shows."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_vqgan

from dalle.pictures import GRID_LIMIT, SIDE, Cell, Sample, labelled_grid, make_grid, make_sheet
from models.vqgan import VQGAN
from sampling import decode, decode_partial
from sampling.partial import BLANK, LINE

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
FRAMES = (46, 139, 87), (200, 60, 50)


def plain(colour, size):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, size, size)


def colours(picture):
    return {colour: count for count, colour in picture.getcolors(1 << 24)}


@pytest.mark.parametrize("size, side", [(16, 128), (64, 128), (96, 192), (256, 128)])
def test_a_contact_sheet_shows_pictures_captions_and_frames(size, side):
    """Small pictures are enlarged by a whole factor, large ones reduced."""
    sample = Sample("côte d’ivoire " * 40, plain(RED, size), plain(GREEN, size), plain(BLUE, size), True)
    sheet = make_sheet([("first", [sample] * 3), ("second", [sample._replace(found=False, caption="")])])
    found = colours(sheet)
    assert found[RED] == found[GREEN] == found[BLUE] == 4 * side * side
    assert found[FRAMES[0]] == 3 * found[FRAMES[1]] > 0 and found[(255, 255, 255)] > sheet.width * sheet.height / 10


@pytest.mark.parametrize("count, columns, side", [(1, 1, 384), (2, 2, 192), (12, 4, 128), (GRID_LIMIT + 6, 8, 128)])
def test_a_grid_is_nearly_square_and_limited(count, columns, side):
    grid = make_grid([plain(RED, 64)] * count)
    shown = min(count, GRID_LIMIT)
    assert colours(grid)[RED] == shown * side * side and columns * side < grid.width <= columns * (side + 12) + 12
    assert grid.height < -(-shown // columns) * (side + 35) + 12
    assert colours(make_grid([plain(RED, 200)]))[RED] == 200 * 200  # large pictures keep their size


@pytest.mark.parametrize("caption", ["a cat", "a cat " * 1000, "кошка", "a" * 3000])
def test_a_grid_carries_its_caption_above_the_pictures(caption):
    without, grid = make_grid([plain(RED, SIDE)] * 4), make_grid([plain(RED, SIDE)] * 4, caption)
    assert without.width == grid.width and without.height < grid.height < without.height + 100
    above = grid.crop((0, 0, grid.width, grid.height - without.height))
    assert 0.01 < 1 - colours(above)[(255, 255, 255)] / (above.width * above.height) < 0.5


def test_what_the_font_does_not_have_becomes_an_ellipsis():
    def drawn(text):
        return make_grid([plain(RED, SIDE)], text).tobytes()

    assert drawn("猫と犬 cat 🐈\u200d⬛\n") == drawn("… cat …") != drawn("cat")


def test_every_section_and_label_is_there():
    cell = Cell([plain(RED, 64), plain(GREEN, 64)], "a label")
    plain_sheet = labelled_grid([("", [cell._replace(label="")] * 4)], columns=2)
    labelled = labelled_grid([("one", [cell] * 4), ("two", [cell])], "legend", columns=2)
    assert colours(labelled)[RED] == 5 * SIDE * SIDE == 1.25 * colours(plain_sheet)[RED]
    assert labelled.width == plain_sheet.width and labelled.height > 1.5 * plain_sheet.height


@pytest.mark.parametrize("hidden", [range(16), range(5, 16), [0, 6, 15], []], ids=str)
def test_a_partial_picture_is_blank_where_codes_are_missing(hidden):
    model = SimpleNamespace(vqgan=VQGAN(tiny_vqgan()).eval(), device="cpu")
    model.dalle = SimpleNamespace(config=SimpleNamespace(grid=4))
    codes = torch.arange(16)[None].repeat(2, 1)
    codes[1, list(hidden)] = -1
    whole, partial = decode_partial(model, codes)
    assert torch.equal(whole[:3], decode(model, codes[:1])[0]) and (whole[3] == 255).all()
    for place in range(16):
        row, column = 4 * (place // 4), 4 * (place % 4)
        square = partial[:, row : row + 4, column : column + 4]
        assert (square[3] == (0 if place in hidden else 255)).all()
        assert place not in hidden or set(square[:3].flatten().tolist()) == {BLANK, LINE}
