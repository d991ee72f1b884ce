"""At which layer do SPADE and the logit lens favour the token that a search took?

Reads the sentences of ``deal.py``, which must have run. At a step where the search took another
token than the greedy one, a lens *favours* it if it gives it more probability than the greedy
token. At the last layer none does: that is what greedy means. Two controls: the tokens among the
five likeliest that the search did not take, at the same steps; and at steps where it kept the
greedy token, those of the same ranks. Intervals are over sets of words.

    python benchmarks/deal_layers.py [--draw]

Writes ``benchmarks/deal_layers.csv`` and ``docs/_static/deal-layers.png``. Some three minutes on
one core.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from concepts import SETS
from deal import REQUEST, SEARCH, kept

import spade_lens as sl
from spade_lens.plots.lines import Layout, line_figure
from spade_lens.plots.style import save_figure
from spade_lens.prompts.inputs import as_prompts
from spade_lens.stats.intervals import ratio_interval
from spade_lens.storage import write_csv

HERE = Path(__file__).parent
K = 5
LAYERS = tuple(range(0, 31, 2))
TAKEN, LEFT, RANKED = (
    "taken by the search",
    "not taken, same steps",
    "same ranks, greedy steps",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draw", action="store_true", help="only draw the figure again")
    if parser.parse_args().draw:
        draw(pd.read_csv(HERE / "deal_layers.csv"))
        return
    torch.set_num_threads(1)
    model = sl.load()
    steps = steps_of(model)
    print(f"{steps['changed'].sum()} of {len(steps)} steps took another token than the greedy one.")
    frame = summary(favoured(model, steps))
    write_csv(HERE / "deal_layers.csv", frame)
    print(frame.round(3).to_string(index=False))
    draw(frame)


def steps_of(model: sl.Model) -> pd.DataFrame:
    """Return every step of every sentence: its prompt, the token taken, and whether it changed."""
    rows = []
    for row in kept():
        if row["arm"] != SEARCH:
            continue
        chat = [{"role": "user", "content": REQUEST.format(", ".join(SETS[row["set"]]))}]
        before = as_prompts(model.tokenizer, chat)[0].tokens
        for at, token in enumerate(row["token_ids"]):
            tokens = (*before, *row["token_ids"][:at])
            rows.append(
                {"set": row["set"], "tokens": tokens, "taken": token}
                | {"changed": at in row["changed"]}
            )
    return pd.DataFrame(rows)


def favoured(model: sl.Model, steps: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every lens, layer, step and token among the five likeliest but the first.

    The column ``favoured`` says whether the lens gives it more than the greedy token.
    """
    prompts = [sl.Prompt(tokens=tokens) for tokens in steps["tokens"]]
    last = sl.read(prompts, "logit", model=model, layers=[model.n_layers], top_k=K)
    top = last.top_tokens[0, 0]  # [step rank]
    prompts = [
        sl.Prompt(tokens=prompt.tokens, candidates=tuple(row))
        for prompt, row in zip(prompts, top.tolist(), strict=True)
    ]
    readout = sl.read(prompts, ["logit", "spade"], model=model, layers=LAYERS)
    more = readout.candidate_logprobs > readout.candidate_logprobs[..., :1]
    taken = torch.tensor(steps["taken"].tolist())[:, None] == top
    changed = torch.tensor(steps["changed"].tolist())
    assert bool((taken[:, 0] == ~changed).all()) and bool(taken.any(dim=1).all())
    frames = []
    for i, lens in enumerate(readout.lenses):
        for j, layer in enumerate(readout.layers):
            for rank in range(1, K):
                own = torch.where(taken[:, rank], 0, torch.where(changed, 1, 2))
                frames.append(
                    pd.DataFrame(
                        {"lens": lens, "layer": layer, "set": steps["set"], "rank": rank}
                        | {"group": np.array([TAKEN, LEFT, RANKED])[own.numpy()]}
                        | {"favoured": more[i, j, :, rank].numpy().astype(float)}
                    )
                )
    return pd.concat(frames, ignore_index=True)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the fraction favoured by lens, layer and group; the ranks are those of tokens taken.

    A control's token counts as often as tokens of its rank were taken, so that all groups have the
    same mix of ranks.
    """
    mix = rows[rows["group"] == TAKEN].groupby("rank").size()
    counts = rows.groupby(["lens", "layer", "group", "rank"]).size().rename("count").reset_index()
    counts["weight"] = counts["rank"].map(mix).fillna(0) / counts["count"]
    rows = rows.merge(counts.drop(columns="count"), on=["lens", "layer", "group", "rank"])
    rows["above"] = rows["favoured"] * rows["weight"]
    found = []
    for (lens, layer, group), some in rows.groupby(["lens", "layer", "group"], sort=False):
        by_set = some.groupby("set")[["above", "weight"]].sum()
        above, below = by_set["above"].to_numpy(), by_set["weight"].to_numpy()
        low, high = ratio_interval(above, below)
        row = {"lens": lens, "layer": layer, "group": group, "mean": above.sum() / below.sum()}
        counted = some[some["weight"] > 0]
        row |= {"low": max(low, 0.0), "high": min(high, 1.0), "sets": len(by_set)}
        found.append(row | {"tokens": len(counted)})
    return pd.DataFrame(found)


def draw(frame: pd.DataFrame) -> None:
    """Draw the fraction favoured by layer."""
    table = frame.assign(line=frame["group"], x=frame["layer"], panel=frame["lens"])
    table = table.sort_values("line", key=lambda line: line != TAKEN, kind="stable")
    table = table.sort_values("panel", kind="stable", ascending=False)
    layout = Layout(ylabel="fraction favoured", fraction=True, height=2.2)
    figure = line_figure(table, layout)
    png, pdf = save_figure(figure, HERE.parent / "docs/_static/deal-layers")
    pdf.unlink()
    print(png)


if __name__ == "__main__":
    main()
