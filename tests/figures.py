"""What tests of figures share: finding lines, and what a reader of a page must be able to read."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


def legend(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.legends[0].texts]


def assert_readable(figure: Figure) -> None:
    """Page width, no small letters, nothing outside, and a legend that covers no panel."""
    assert figure.get_figwidth() == 6.9
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            assert text.get_fontsize() >= 7, text
    drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert page.x0 <= drawn.x0 and drawn.x1 <= page.x1, drawn
    assert page.y0 <= drawn.y0 and drawn.y1 <= page.y1, drawn
    box = figure.legends[0].get_window_extent()
    assert not any(panel.get_window_extent().overlaps(box) for panel in figure.axes)


def line(panel: Axes, label: str) -> Any:
    (found,) = (x for x in panel.lines if x.get_label() == label)
    return found


def titles(figure: Figure) -> list[str]:
    return [panel.get_title() for panel in figure.axes]


def corners(panel: Axes) -> set[float]:
    """The heights of all ends of intervals, rounded."""
    paths = [path.vertices for c in panel.collections for path in c.get_paths()]
    return set(np.concatenate(paths)[:, 1].round(9))
