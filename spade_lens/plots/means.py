"""Means with their intervals, as points side by side: a summary that no other figure fits."""

import pandas as pd

from spade_lens.plots.registry import figure
from spade_lens.plots.style import PageFigure, panel_grid

_OF_A_MEAN = ("measure", "mean", "low", "high", "n", "tasks")
_BY_NUMBER = ("layer", "position", "shots", "demo", "draft_tokens", "depth")
"""Columns along which a line goes: such tables have figures of their own."""
_MOST = 40
_INCHES = 0.17


@figure(
    "means",
    needs=("measure", "mean", "low", "high"),
    source="stats.summarise",
    fits=lambda frame: not set(_BY_NUMBER) & set(frame.columns),
)
def plot_means(frame: pd.DataFrame) -> PageFigure:
    """Draw every mean of a summary as a point with its interval.

    With several groups, such as tasks, every measure has a panel. With one group the measures stand
    below each other.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"measure": ["accuracy_first_token", "accuracy_scored"],
        ...     "mean": [0.9, 0.7], "low": [0.8, 0.5], "high": [0.95, 0.8], "n": 50})
        >>> [label.get_text() for label in sl.plot(rows).axes[0].get_yticklabels()]
        ['accuracy first token', 'accuracy scored']

    Args:
        frame: From :func:`spade_lens.stats.summarise`.

    Raises:
        ValueError: If there are more groups than fit a page, or two rows of one group and measure.
    """
    frame = frame.reset_index(drop=True).assign(measure=frame["measure"].astype(str).to_numpy())
    told = [c for c in frame.columns if c not in _OF_A_MEAN and frame[c].nunique(dropna=False) > 1]
    rows_told = zip(*(frame[column] for column in told), strict=True)
    groups = (
        pd.Series([", ".join(map(str, row)) for row in rows_told]) if told else frame["measure"]
    )
    names = list(dict.fromkeys(groups))
    panels = list(dict.fromkeys(frame["measure"])) if told else [""]
    twice = pd.DataFrame({"group": groups, "measure": frame["measure"]}).duplicated()
    if len(names) > _MOST or twice.any():
        raise ValueError(
            f"{len(names)} groups were given, {twice.sum()} rows of them of a group and measure "
            f"that came before; expected at most {_MOST}, each measure once."
        )
    drawing, axes = panel_grid(len(panels), height=0.35 + _INCHES * len(names), sharex=False)
    for measure, ax in zip(panels, axes, strict=True):
        rows = frame[frame["measure"] == measure] if told else frame
        y = [names.index(group) for group in groups[rows.index]]
        ax.hlines(y, rows["low"], rows["high"], color="#0072B2", lw=1.2)
        ax.plot(rows["mean"], y, "o", color="#0072B2", ms=3.6, clip_on=False, zorder=3)
        ax.set_title(_spelled(measure))
        if rows["low"].min() >= 0 and rows["high"].max() <= 1:
            ax.set_xlim(-0.02, 1.02)
        else:
            ax.axvline(0, color="0.6", lw=0.6, zorder=1)
    axes[0].set_yticks(range(len(names)), [_spelled(name) for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    drawing.supxlabel("mean and interval")
    return drawing


def _spelled(name: str) -> str:
    return name.replace("_", " ")
