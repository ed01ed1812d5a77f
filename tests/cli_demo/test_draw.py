"""Pictures are real PNG files, whatever they are drawn from."""

import errno

import pytest

from onecopy import Extent
from onecopy.cli import draw

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


def bar(count, **more):
    return draw.Bar("8 copies", count, "8.00 copies", **more)


def test_panels(tmp_path):
    panels = [draw.Panel("Memory", 100, "one copy", [bar(800), bar(800, measured=False), bar(101, ours=True)])] * 2
    draw.draw_panels("title", "footnote", panels, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [Extent(0, 0, 7, 0, "hole")],
        [Extent(0, 512, 100, 1, "data"), Extent(100, 0, 50, 0, "hole"), Extent(150, 90, 1, 1, "unwritten")],
        [Extent(page, 10_000 - page, 1, page % 12 + 1, "data") for page in range(5_000)],
    ],
)
def test_extents(tmp_path, extents):
    draw.draw_extents(extents, "/base.npy", str(tmp_path / "e.png"))
    assert (tmp_path / "e.png").read_bytes().startswith(PNG)


def test_a_name_is_not_a_formula(tmp_path):
    draw.draw_extents([Extent(0, 512, 100, 1, "data")], "/$x^$ \udcff\n", str(tmp_path / "e.png"))


def test_sharers_fall_into_the_kind_below():
    kinds = [draw._kind(Extent(0, 1, 1, sharers, "data"))[0] for sharers in (1, 2, 3, 7, 8, 1_000)]
    assert kinds == ["one owner", "2 sharers", "3 to 7 sharers", "3 to 7 sharers", "8 and more", "8 and more"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "available", lambda: False)
    with pytest.raises(OSError, match=r"pip install 'onecopy\[plot\]'") as error:
        draw.draw_extents([], "/f", str(tmp_path / "e.png"))
    assert error.value.errno == errno.ENOPKG
    assert not (tmp_path / "e.png").exists()
