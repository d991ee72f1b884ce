"""What a fitted lens says of itself, drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from tiny import tiny

from spade_lens import Model, load
from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.fitting.text import calibration_text
from spade_lens.plots.lenses import plot_held_out

VALUES = ["kl_to_model", "agrees_with_model", "kl_to_spade", "agrees_with_spade"]


@pytest.fixture(scope="module")
def held_out(tiny_llama: Model) -> pd.DataFrame:
    """Of L-SPADE at four layers."""
    text = calibration_text(load(tiny("llama")), n_pieces=30, n_tokens=16)
    return fit("l-spade", tiny_llama, text, per_piece="all").held_out


def lines_of(panel: Axes) -> list[Line2D]:
    """Those of lenses, without the line at 0."""
    return [line for line in panel.lines if not str(line.get_label()).startswith("_")]


@pytest.mark.parametrize("value", [*VALUES, None])
def test_lines_are_the_table(held_out: pd.DataFrame, value: str | None) -> None:
    figure = plot_held_out(held_out, value)  # type: ignore[arg-type]
    assert figure.get_figwidth() == 6.9
    values = VALUES if value is None else [value]
    assert len(figure.axes) == len(values)
    for panel, name in zip(figure.axes, values, strict=True):
        assert ("agreement" in panel.get_title()) == name.startswith("agrees")
        assert ("SPADE" in panel.get_title()) == name.endswith("spade")
        for line in lines_of(panel):
            rows = held_out[held_out["lens"] == line.get_label()]
            np.testing.assert_array_equal(line.get_xdata(), rows["layer"])
            np.testing.assert_array_equal(line.get_ydata(), rows[name])
    labels = [t.get_text() for t in figure.legends[0].texts]
    assert labels == ["L-SPADE", "logit lens", "SPADE"]


def test_lenses_fitted_on_the_same_text_share_their_controls(held_out: pd.DataFrame) -> None:
    other = held_out.replace({"lens": {"L-SPADE": "tuned lens"}})
    (panel,) = plot_held_out(pd.concat([held_out, other])).axes
    labels = [line.get_label() for line in lines_of(panel)]
    assert labels == ["L-SPADE", "logit lens", "SPADE", "tuned lens"]
    assert {len(line.get_xdata()) for line in lines_of(panel)} == {4}  # type: ignore[arg-type]


def test_what_cannot_be_plotted_is_said(held_out: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="needs the columns .*'kl_to_model'.*fitted here"):
        plot_held_out(pd.DataFrame())
    with pytest.raises(ValueError, match="'loss' was asked for; .*'kl_to_model'"):
        plot_held_out(held_out, "loss")
    changed = held_out.assign(kl_to_model=held_out["kl_to_model"] + 1)
    with pytest.raises(ValueError, match=r"of one layer are of \['L-SPADE', 'logit lens', 'SPADE"):
        plot_held_out(pd.concat([held_out, changed]))
