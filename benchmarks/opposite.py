"""Rule vectors of the prompt's own mapping against those of the opposite one, on the same prompts.

How often the answer flips depends on how far apart the two labels are to begin with. The paired
difference of logits does not, and balanced accuracy does not profit from a model that likes one
label. Writes ``opposite.csv`` and ``.json``. A quarter of an hour on two cores.

    python benchmarks/opposite.py [--task animal/country ...] [--samples 64] [--layers 6 24]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import spade_lens as sl
from spade_lens import icl
from spade_lens.icl import Condition
from spade_lens.stats.intervals import mean_interval, proportion_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.tasks import Episode
from spade_lens.tasks.episodes import draw_episodes

HERE = Path(__file__).parent
TASKS = ("animal/country", "country/vehicle", "number/fruit", "string-length")
SITES = {"labels to the top": "labels", "final position": "final"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", action="append", help="repeatable; of two labels each")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load()
    found = []
    for name in args.task or TASKS:
        episodes = draw_episodes(sl.task(name), args.samples, shots=args.shots, seed=args.seed)
        frame = icl.patch_sweep(
            model,
            episodes,
            conditions=[
                Condition(name, source=source, site=site, window=None if site == "labels" else 1)
                for where, site in SITES.items()
                for name, source in ((where, "own"), (f"{where}, opposite", "opposite"))
            ],
            layers=args.layers,
            setup=icl.PromptSetup(seed=args.seed),
            folder=HERE / ".claims" / model.name / "opposite" / name.replace("/", "-"),
        ).to_frame()
        found.append(compared(frame, episodes).assign(task=name))
        # After every task, so that a look is possible before the end.
        write_csv(HERE / "opposite.csv", pd.concat(found, ignore_index=True))
    rows = pd.concat(found, ignore_index=True)
    table = as_text(rows)
    print(table)
    arguments = {k: str(v) for k, v in vars(args).items()}
    about = provenance(model, arguments=arguments, seed=args.seed)
    write_json(HERE / "opposite.json", about | {"table": table.splitlines()})


def compared(frame: pd.DataFrame, episodes: list[Episode]) -> pd.DataFrame:
    """Rows of a site at a layer: flips, balanced accuracy, and the paired difference."""
    answers = np.array([episode.answer for episode in episodes])
    rows = []
    for site in SITES:
        for layer in sorted(set(frame["layer"]) - {-1}):
            here = frame[frame["layer"] == layer].set_index(["condition", "prompt"]).sort_index()
            own, other = here.loc[site], here.loc[f"{site}, opposite"]
            difference = (own["logit_diff"] - other["logit_diff"]).to_numpy(dtype=float)
            n, above = len(difference), int((difference > 0).sum())
            flips = int((~other["prefers"].astype(bool)).sum())
            values = {
                "own minus opposite, logit difference": (
                    difference.mean(),
                    *mean_interval(difference),
                ),
                "own above opposite, share of prompts": (
                    above / n,
                    *proportion_interval(above, n),
                ),
                "the opposite's answer preferred": (flips / n, *proportion_interval(flips, n)),
                "balanced accuracy, own": _balanced(own, answers),
                "balanced accuracy, opposite by its own rule": _balanced(other, answers, flip=True),
            }
            rows += [
                {
                    "condition": site,
                    "layer": layer,
                    "measure": measure,
                    "mean": float(value),
                    "low": float(low),
                    "high": float(high),
                    "n": n,
                }
                for measure, (value, low, high) in values.items()
            ]
    return pd.DataFrame(rows)


def _balanced(
    rows: pd.DataFrame, answers: "np.ndarray[tuple[int], np.dtype[np.str_]]", *, flip: bool = False
) -> tuple[float, float, float]:
    """The mean over labels of how often the right one is preferred; Student's over prompts."""
    right = rows["prefers"].to_numpy(dtype=bool) ^ flip
    asked = answers[rows.index.to_numpy()]
    labels = np.unique(asked)
    # Every label counts the same, however often it is asked for.
    weight = np.array([len(asked) / len(labels) / (asked == label).sum() for label in asked])
    value = float((weight * right).mean())
    low, high = mean_interval(weight * (right - value) + value)
    return value, max(low, 0.0), min(high, 1.0)


def as_text(rows: pd.DataFrame) -> str:
    """A row for every task, site and layer."""
    cells = rows.assign(
        cell=[
            f"{m:.2f} [{low:.2f}, {high:.2f}]"
            for m, low, high in zip(rows["mean"], rows["low"], rows["high"], strict=True)
        ]
    )
    wide = cells.pivot(index=["task", "condition", "layer"], columns="measure", values="cell")
    return wide.to_string()


if __name__ == "__main__":
    main()
