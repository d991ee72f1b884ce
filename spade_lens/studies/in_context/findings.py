"""The figures and the text of a study of learning in context, made from its tables."""

from collections.abc import Mapping

import pandas as pd

from spade_lens import plots
from spade_lens.studies.base import Findings
from spade_lens.studies.in_context.probes import first_below


def in_context_findings(tables: Mapping[str, pd.DataFrame]) -> Findings:
    """Put together what a study reports.

    Args:
        tables: Its tables by name, each with the column ``seed``.
    """
    figures = {"history": plots.plot(tables["history"], "training")}
    if "risk" in tables:
        figures["risk"] = plots.plot(tables["risk"], "risk")
    if "probes" in tables:
        figures["probes"] = plots.plot(tables["probes"], "probes_by_layer")
    if "validation" in tables:
        figures["validation"] = plots.plot(tables["validation"], "validation")
        figures["stopping"] = plots.plot(
            tables["validation"], "validation", measure="normalised error"
        )
    if "selection" in tables:
        figures["selection"] = plots.plot(tables["selection"], "validation", measure="weight")
    return Findings(tables, figures, text_of(tables))


def text_of(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return what was found as text: ratios, layers, pasting, and what was held against."""
    parts = []
    if "ratios" in tables:
        rows = tables["ratios"].assign(
            interval=lambda t: [
                f"{r:.2f} [{a:.2f}, {b:.2f}]"
                for r, a, b in zip(t["ratio"], t["ratio_low"], t["ratio_high"], strict=True)
            ]
        )
        table = rows.pivot_table(
            index=["baseline", "last"], columns="seed", values="interval", aggfunc="first"
        )
        parts.append(
            "Mean squared error of the network over that of a baseline, by seed\n"
            + table.to_string()
        )
    if "probes" in tables:
        parts.append("Probes\n" + probe_summary(tables["probes"]).round(3).to_string(index=False))
    if "pasting" in tables:
        by = ["upper", "read_in", "parameters"]
        pasted = tables["pasting"].pivot_table(index=by, columns="seed", values="mean", sort=False)
        parts.append("Linear tasks, mean squared error, by seed\n" + pasted.round(3).to_string())
        differences = tables["pasting-differences"].round(3)
        parts.append("Lower behind trained blocks by\n" + differences.to_string(index=False))
    if "validation" in tables:
        whole = tables["validation"][tables["validation"]["layer"].isna()].drop(columns="layer")
        parts.append("Held against what is exact\n" + whole.round(3).to_string(index=False))
    if "selection" in tables:
        by = ["seed", "method", "truth"]
        selected = tables["selection"].pivot_table(
            index=by, columns="layer", values="score", sort=False
        )
        selected = selected.sort_index(axis=1).round(2)
        parts.append("Selection of a representation, by layer\n" + selected.to_string())
    return "\n\n".join(parts)


def probe_summary(probes: pd.DataFrame) -> pd.DataFrame:
    """Return the best layer of every probe, of both networks, and where it falls below half.

    Columns ``seed``, ``network``, ``place``, ``quantity``, ``layer`` (the best), ``probe_error``
    there, and ``first_layer`` (the first below .5; missing if none, or of an untrained network).
    """
    rows = []
    keys = ["seed", "network", "place", "quantity"]
    for key, some in probes.groupby(keys, sort=False):
        best = some.sort_values("probe_error").iloc[0]
        seed, network, place, quantity = key
        below = first_below(probes[probes["seed"] == seed], str(place), str(quantity))
        rows.append(
            {**dict(zip(keys, key, strict=True)), "layer": int(best["layer"])}
            | {"probe_error": best["probe_error"]}
            | {"first_layer": below if network == "trained" else float("nan")}
        )
    return pd.DataFrame(rows)
