"""Does it pay to choose the exit for every prompt? ExitPrefill by a rule, beside fixed layers.

On SmolLM2-135M-Instruct in fp32 with one thread, on the pieces of WikiText of exit_prefill.py, with
the last 8 tokens kept and the others mapped. A rule looks at the entropy of L-SPADE, or of the
logit lens, after the piece's last token. A third of other pieces would leave at layer 22, half of
the rest at 23, and all others leave at 24. The control are as many exits at every layer, dealt at
random: their mean is known from the fixed layers. Writes ``exit_prefill_rule.csv`` and ``.json``.

    python benchmarks/exit_prefill_rule.py [--samples 24]
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from exit_prefill import DATA, LAYERS, NEW, fitted, wikitext

import spade_lens as sl
from spade_lens.exits import Confidence, SpadeExit, Threshold, exit_tables
from spade_lens.generation import ExitPrefill
from spade_lens.generation.scoring import forced_logits
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.studies.fit import default_lens

OUT = Path(__file__).with_suffix(".csv")
KEEP = sl.Keep(last=8)
N_TOKENS = 450
CALIBRATION = 24  # pieces that set the thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data")
    parser.add_argument("--samples", type=int, default=24, help="texts to measure on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load()
    shortcuts = fitted(model, args.data)
    ids = wikitext(model, args.data)
    step = (len(ids) - N_TOKENS - NEW) // args.samples
    starts = [n * step for n in range(args.samples)]
    pieces = [sl.Prompt(ids[at : at + N_TOKENS]) for at in starts]
    new = [ids[at + N_TOKENS : at + N_TOKENS + NEW] for at in starts]
    # Half way between those that are measured, as far from both as there is text.
    half = step // 2
    others = [sl.Prompt(ids[at + half : at + half + N_TOKENS]) for at in starts[:CALIBRATION]]
    strategies: dict[str, ExitPrefill | None] = {"full model": None}
    for layer in LAYERS:
        strategies[f"layer {layer}"] = ExitPrefill(layer, KEEP, shortcuts[layer])
    for lens in (default_lens(model), sl.lenses.LogitLens(model)):
        engine = SpadeExit(model, lens, thresholds(model, lens, others), layers=LAYERS)
        strategies[f"by {lens.name}"] = ExitPrefill(engine, KEEP, list(shortcuts.values()))
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in strategies}
    with torch.no_grad():
        for piece, tokens in zip(pieces, new, strict=True):
            for name, figures in compared(model, piece, tokens, strategies):
                found[name].append(figures)
            print(piece, {name: rows[-1] for name, rows in found.items()}, flush=True)
    frame = table(found)
    write_csv(OUT, frame)
    arguments = {key: str(value) for key, value in vars(args).items()}
    about = provenance(model, arguments=arguments, threads=1)
    about["shortcuts"] = {str(layer): dict(s.about) for layer, s in shortcuts.items()}
    about["thresholds"] = {
        name: {str(k): v for k, v in one.engine.policy.value.items() if v > -torch.inf}
        for name, one in strategies.items()
        if one is not None and one.engine is not None
    }
    write_json(OUT.with_suffix(".json"), about)
    print(frame.round(3).to_string(index=False))


def thresholds(model: sl.Model, lens: sl.lenses.Lens, prompts: list[sl.Prompt]) -> Threshold:
    """Return thresholds at which a third would leave at each of the three layers."""
    [seen] = exit_tables(model, prompts, Confidence(lens), answerers="logit", layers=LAYERS)
    by_layer, stay = {}, torch.ones(len(seen), dtype=torch.bool)
    for row, (layer, fraction) in enumerate(zip(LAYERS, (1 / 3, 1 / 2), strict=False)):
        by_layer[layer] = float(seen.confidence[row][stay].quantile(1 - fraction))
        stay &= seen.confidence[row] < by_layer[layer]
    return Threshold(by_layer | {LAYERS[-1]: -torch.inf}, label=f"thirds of {lens.name}")


def compared(
    model: sl.Model,
    piece: sl.Prompt,
    tokens: list[int],
    strategies: dict[str, ExitPrefill | None],
) -> list[tuple[str, tuple[float, float, int]]]:
    """Return agreement, divergence and layer of every strategy on one piece."""
    rows, full = [], None
    for name, strategy in strategies.items():
        [(_, logits)] = forced_logits(model, [piece], [tokens], strategy)
        given = logits.log_softmax(dim=-1)
        full = given if full is None else full
        agrees = float((given.argmax(dim=-1) == full.argmax(dim=-1)).float().mean())
        kl = float((full.exp() * (full - given)).sum(dim=-1).mean())
        layer = model.n_layers
        if strategy is not None:
            engine = strategy.engine
            layer = strategy.borders[0]
            if engine is not None:
                layer = int(engine.run([piece]).exit_layer)
        rows.append((name, (agrees, kl, layer)))
    return rows


def table(found: dict[str, list[tuple[float, float, int]]]) -> pd.DataFrame:
    """Return the means, and for every rule what dealing its exits at random would give."""
    rows = []
    for name, of_way in found.items():
        agrees, kl, layers = (np.array(column, dtype=float) for column in zip(*of_way, strict=True))
        row = {"strategy": name, "n": len(agrees), "layer": layers.mean()}
        for what, values in (("agreement", agrees), ("kl", kl)):
            low, high = mean_interval(values)
            row |= {what: values.mean(), f"{what}_low": low, f"{what}_high": high}
        if name.startswith("by "):
            share = {layer: float((layers == layer).mean()) for layer in LAYERS}
            dealt = sum(
                share[layer] * np.array([one[0] for one in found[f"layer {layer}"]])
                for layer in LAYERS
            )
            low, high = mean_interval(agrees - dealt)
            row |= {"less_dealt": (agrees - dealt).mean()}
            row |= {"less_dealt_low": low, "less_dealt_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
