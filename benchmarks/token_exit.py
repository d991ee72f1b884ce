"""What tokens that leave early cost and lose: agreement, KL, layers and processor time.

On SmolLM2-135M-Instruct in fp32 on a CPU, one row, one thread, on the kinds of prompts of
``speculation.py``. The full model writes every prompt greedily. *Agreement* is the fraction of
these tokens, given one by one, at which the exit has the full model's top token; *KL* is
KL(full || exit) there. Both leave out the first token, which the whole prompt gives. *Speed* is the
processor time of a whole call of plain text over the strategy's, in turns. Exits are read by the
model's own norm and head; with ``--lens`` also by a tuned lens fitted on WikiText-2's test text and
kept in ``benchmarks/.token-exit``.

    python benchmarks/token_exit.py --data FOLDER [--n 2] [--tokens 24] [--rounds 2] [--lens]
    python benchmarks/token_exit.py --print
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from speculation import kinds

import spade_lens as sl
from spade_lens.exits import FixedLayer
from spade_lens.generation import TokenExit
from spade_lens.generation.scoring import forced_logits
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance

OUT = Path(__file__).with_suffix(".csv")
KEPT = Path(__file__).parent / ".token-exit"
LAYERS = (18, 21, 24, 27)
MEASURES = ("agreement", "kl", "blocks", "speed")
FEWEST = 5
"""Of fewer prompts there are no intervals: Student's are then wider than all that is possible."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with spec_bench and wikitext-2")
    parser.add_argument("--n", type=int, default=2, help="prompts of every kind")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every strategy")
    parser.add_argument("--lens", action="store_true", help="also read by a tuned lens")
    parser.add_argument("--print", action="store_true", help="only print the table again")
    args = parser.parse_args()
    if not args.print:
        assert args.data is not None, "--data is needed"
        measure(args)
    print(table(pd.read_csv(OUT)))


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = sl.load()
    about = {"n": args.n, "tokens": args.tokens, "rounds": args.rounds, "threads": 1}
    write_json(OUT.with_suffix(".json"), provenance(model, **about))
    rows = []
    with sl.Settings(progress=False):
        lens = fitted(model, args.data) if args.lens else None
        for kind, prompts in kinds(args.data, model, args.n).items():
            for number, prompt in enumerate(prompts):
                for row in of_prompt(model, prompt, lens, args.tokens, args.rounds):
                    rows.append({"kind": kind, "prompt": number} | row)
                print(kind, number, flush=True)
            write_csv(OUT, summary(pd.DataFrame(rows)))


def fitted(model: sl.Model, data: Path) -> Any:
    """Return a tuned lens of the candidate layers, fitted once."""
    if not (KEPT / "lens.json").exists():
        text = data / "wikitext-2" / "test.txt"
        options: dict[str, Any] = {"n_pieces": 60, "n_tokens": 128, "per_piece": "all"}
        sl.fit("tuned", model, text, layers=LAYERS, passes=3, **options).save(KEPT)
    return sl.lenses.load_lens(KEPT, model)


def strategies(lens: Any) -> dict[str, TokenExit]:
    """Return what is compared, by name."""
    own = {
        **{f"always at {layer}": TokenExit(layer, FixedLayer(layer)) for layer in (24, 27)},
        "top-1 above .5": TokenExit(LAYERS, 0.5),
        "top-1 above .9": TokenExit(LAYERS, 0.9),
        "saturation above .95": TokenExit(LAYERS, 0.95, "saturation"),
    }
    if lens is None:
        return own
    tuned = {
        f"tuned lens, top-1 above {value:g}": TokenExit(LAYERS, value, lens=lens)
        for value in (0.5, 0.9)
    }
    return own | tuned


def of_prompt(
    model: sl.Model, prompt: sl.Prompt, lens: Any, n: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yield the figures of every strategy on one prompt."""

    def run(strategy: Any) -> tuple[Any, float]:
        start = time.thread_time()
        written = sl.generate(prompt, n, model=model, stop=(), strategy=strategy)
        return written, time.thread_time() - start

    plain, _ = run(None)
    tokens = plain.tokens[0]

    def given(strategy: Any) -> torch.Tensor:
        with torch.no_grad():
            ((_, logits),) = forced_logits(model, [prompt], [tokens], strategy)
        return logits[1:].log_softmax(dim=-1)

    full = given(None)
    _, before = run(None)
    for name, strategy in strategies(lens).items():
        said = given(strategy)
        ratios = []
        for _ in range(rounds):
            written, own = run(strategy)
            _, after = run(None)
            ratios.append((before + after) / 2 / own)
            before = after
        yield {
            "strategy": name,
            "agreement": float((said.argmax(-1) == full.argmax(-1)).float().mean()),
            "kl": float((full.exp() * (full - said)).sum(-1).mean()),
            "blocks": float(written.exit_layer[1:].float().mean() / model.n_layers),
            "speed": float(np.median(ratios)),
        }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return means over prompts, of speeds geometric ones, with Student's intervals from n = 5."""
    rows = []
    for (kind, name), part in pd.concat([frame, frame.assign(kind="all")]).groupby(
        ["kind", "strategy"], sort=False
    ):
        row: dict[str, Any] = {"kind": kind, "strategy": name, "n": len(part)}
        for measure in MEASURES:
            values = part[measure].to_numpy()
            values = np.log(values) if measure == "speed" else values
            interval = mean_interval(values) if len(values) >= FEWEST else (np.nan, np.nan)
            ends = np.array([values.mean(), *interval])
            ends = np.exp(ends) if measure == "speed" else ends
            row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), ends, strict=True))
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def table(frame: pd.DataFrame) -> str:
    """Return the table of the documentation: all kinds together."""
    lines = ["| strategy | blocks run | agreement | KL | speed |", "|---|---|---|---|---|"]
    for row in frame[frame["kind"] == "all"].to_dict("records"):
        cells = []
        for m in ("agreement", "kl", "speed"):
            low, high = row[f"{m}_low"], row[f"{m}_high"]
            cells.append(f"{row[m]:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"))
        lines.append(f"| {row['strategy']} | {row['blocks']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
