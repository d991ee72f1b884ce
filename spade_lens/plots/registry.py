"""Find the figure of a table by its columns. Figures register themselves, a user's own as well.

This module knows no figure. Figures know tables only: they never compute with a model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, Literal, ParamSpec

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from spade_lens.checks import checked
from spade_lens.plots.style import style
from spade_lens.stats.frames import TableLike, as_frame, check_columns

P = ParamSpec("P")
Draw = Callable[Concatenate[pd.DataFrame, P], Figure]
Drawn = Callable[Concatenate[TableLike, P], Figure]


@dataclass(frozen=True)
class _Kind:
    name: str
    needs: tuple[str, ...]
    source: str
    fits: Callable[[pd.DataFrame], bool] | Literal[False] | None
    draw: Callable[..., Figure]

    def suits(self, frame: pd.DataFrame) -> bool:
        if self.fits is False or not set(self.needs) <= set(frame.columns):
            return False
        return self.fits is None or self.fits(frame)


_KINDS: dict[str, _Kind] = {}


@checked
def figure(
    kind: str,
    *,
    needs: Sequence[str],
    source: str = "",
    fits: Callable[[pd.DataFrame], bool] | Literal[False] | None = None,
) -> Callable[[Draw[P]], Drawn[P]]:
    """Register a function that draws a data frame as a kind of figure.

    The function may then be called with every kind of table, is found by :func:`plot`, and draws
    in the library's style. Tables that lack a column or rows are refused before it is called, and
    so are rows of several models where prompts are averaged. The library's own figures return a
    matplotlib figure that is not shown. They refuse what an option names and the table lacks.

    Example:
        >>> from matplotlib.figure import Figure
        >>> @sl.plots.figure("lengths", needs=("prompt", "length"), source="my_lengths")
        ... def plot_lengths(frame, color="black"):
        ...     drawing = Figure()
        ...     drawing.subplots().bar(frame["prompt"], frame["length"], color=color)
        ...     return drawing
        >>> import pandas as pd
        >>> drawing = sl.plot(pd.DataFrame({"prompt": [0, 1], "length": [12, 7]}), color="red")

    Args:
        kind: Its name. A later figure replaces an earlier one of the same name.
        needs: The columns that it cannot do without.
        source: What makes such tables, for messages.
        fits: Whether a table with these columns should be drawn so when no kind is named;
            ``False`` for a figure that is only drawn by name.
    """

    def register(draw: Draw[P]) -> Drawn[P]:
        draw = checked(draw)

        @wraps(draw)
        def drawn(table: TableLike, /, *args: P.args, **kwargs: P.kwargs) -> Figure:
            frame = as_frame(table)
            check_columns(frame, needs, what=f"the figure {kind!r}", source=source)
            if "prompt" in needs and "model" in frame.columns and frame["model"].nunique() > 1:
                models = list(frame["model"].unique())
                raise ValueError(
                    f"The figure {kind!r} was given rows of the models {models}, whose prompts "
                    "would be averaged; draw one model at a time."
                )
            with mpl.rc_context(style()):
                return draw(frame, *args, **kwargs)

        _KINDS[kind] = _Kind(kind, tuple(needs), source, fits, drawn)
        return drawn

    return register


@checked
def plot(table: TableLike, kind: str | None = None, **options: Any) -> Figure:
    """Draw a result or a table. Its columns say as what, unless ``kind`` does.

    Example:
        >>> figure = sl.plot(sl.read("ab->AB,cd->", model=model, positions="all"))
        >>> with sl.plots.Page(width=3.3):  # a column of a paper
        ...     figure = sl.plot(sl.read(["ab->AB,cd->", "q->"], model=model), value="agreement")

    Args:
        table: A data frame, a result with ``to_frame()`` such as a readout, or a list of them.
        kind: One of :func:`spade_lens.plots.kinds`. By default the figure that needs most of the
            table's columns; of two such figures, the one that was registered last.
        options: Options of the figure, as its own function documents them.

    Returns:
        The figure. Nothing is shown, and pyplot's global state is not touched; notebooks draw
        the figure that is a cell's value.

    Raises:
        TypeError: If ``table`` is not a table, or the figure has no such option.
        ValueError: If the kind is unknown, no figure fits, or the table does not fit the figure.
    """
    frame = as_frame(table)
    if kind is not None and not (isinstance(kind, str) and kind in _KINDS):
        raise ValueError(f"kind={kind!r} was given; expected one of {sorted(_KINDS)}.")
    if kind is None:
        fitting = [one for one in _KINDS.values() if one.suits(frame)]
        if not fitting:
            raise ValueError(_no_figure(frame))
        kind = max(reversed(fitting), key=lambda one: len(one.needs)).name
    draw = _KINDS[kind].draw
    known = list(signature(draw).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"The figure {kind!r} has no option {unknown}; its options are {known}.")
    return draw(frame, **options)


def kinds() -> pd.DataFrame:
    """Return the kinds of figures: what each shows, the columns it needs, what makes its table."""
    rows = [
        {
            "kind": kind.name,
            "shows": (kind.draw.__doc__ or "").strip().partition("\n")[0],
            "needs": " ".join(kind.needs),
            "source": kind.source,
        }
        for kind in _KINDS.values()
    ]
    return pd.DataFrame(rows)


def _no_figure(frame: pd.DataFrame) -> str:
    columns = list(frame.columns)
    lacking = {
        kind.name: [column for column in kind.needs if column not in columns]
        for kind in _KINDS.values()
        if kind.fits is not False
    }
    nearest = sorted(lacking, key=lambda name: len(lacking[name]) / len(_KINDS[name].needs))[:3]
    near = "; ".join(
        f"{name!r} lacks {lacking[name]} (made by {_KINDS[name].source or 'its user'})"
        for name in nearest
    )
    return (
        f"No figure fits a table with the columns {columns}. Nearest: {near}. Give the table of "
        f"one, or name a figure with kind=, one of {sorted(_KINDS)}, to see what it needs."
    )
