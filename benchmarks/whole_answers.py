"""Whole answers after an exit: accuracy by first token, by score and as generated.

On SmolLM2-135M-Instruct in fp32 with one thread. Every prompt has its right answer and fixed rivals
as candidates. The full model is compared with exits from the prompt at four layers and three keep
sets, with the kept tokens as a shorter prompt, and with fewer demonstrations. Keeping everything is
the full model, which tests show. Gains are over the full model on the same prompts. The table is
written after every configuration, and one that stands in it is not measured again.

    python benchmarks/whole_answers.py --pairs FOLDER [--n 40] [--task NAME ...]
    python benchmarks/whole_answers.py --print

FOLDER holds ``country-capital.json`` and ``english-french.json``: longer lists than the library's.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

import spade_lens as sl
from spade_lens.generation import ExitPrefill, score_answers
from spade_lens.stats.intervals import paired_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.tasks import DecisionTask, SkippedExamplesWarning, WordPairTask

OUT = Path(__file__).with_suffix(".csv")
SEED = 0
LAYERS = (15, 18, 21, 24)
KEEPS = {
    "query+labels": sl.Keep(spans=("query", "labels")),
    "last 32": sl.Keep(last=32),
    "start+answer": sl.Keep(),
}
SHOTS = {"country-capital": 16, "english-french": 16, "sciq-words": 4, "arc-easy-words": 4}
KEYS = ["strategy", "layer", "keep"]
COUNTS = ["correct_first_token", "correct_scored", "correct_generated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=Path, help="the folder of longer lists of pairs")
    parser.add_argument("--n", type=int, default=40, help="prompts of a task")
    parser.add_argument("--task", choices=tuple(SHOTS), action="append", help="repeatable")
    parser.add_argument("--print", action="store_true", help="only print the table again")
    args = parser.parse_args()
    if not args.print:
        measure(args)
    print(table(pd.read_csv(OUT)))


def measure(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", SkippedExamplesWarning)
    torch.set_num_threads(1)
    model = sl.load()
    names = args.task or list(SHOTS)
    done = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame(columns=["task", *KEYS])
    for name in names:
        task, full = chosen(name, args.pairs), None
        known = {tuple(map(str, key)) for key in done.loc[done["task"] == name, KEYS].to_numpy()}
        for about, score in of_task(model, task, SHOTS[name], args.n):
            if full is not None and tuple(str(about[key]) for key in KEYS) in known:
                continue
            scores = score()
            full = scores if full is None else full
            rows = pd.DataFrame({"task": name} | about | row for row in summary(scores, full))
            if about["strategy"] == "full model":
                done = done[(done["task"] != name) | (done["strategy"] != "full model")]
            done = rows if done.empty else pd.concat([done, rows], ignore_index=True)
            write_csv(OUT, done)
            print(name, about, rows["mean"].tolist(), flush=True)
        about = provenance(model, seed=SEED, n=args.n, threads=1, shots=SHOTS)
        write_json(OUT.with_suffix(".json"), about)


def chosen(name: str, folder: Path | None) -> DecisionTask:
    """Return a task as decisions among whole answers."""
    if name.endswith("-words"):
        return sl.task(name)
    assert folder is not None, "--pairs is needed"
    pairs = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return WordPairTask(name, tuple((p["input"], p["output"]) for p in pairs)).decisions(shots=16)


def of_task(
    model: sl.Model, task: DecisionTask, shots: int, n: int
) -> Iterator[tuple[dict[str, Any], Callable[[], pd.DataFrame]]]:
    """Yield every configuration and what scores the same prompts, the full model first."""
    options: dict[str, Any] = {"seed": SEED, "fewer": True}
    prompts = task.prompts(model.tokenizer, n, shots=shots, **options)

    def scored(name: str, prompts: list[sl.Prompt], strategy: Any = None, **about: Any) -> Any:
        kept = [len(p) if strategy is None else len(strategy.kept(p, len(p) - 1)) for p in prompts]
        whole = [len(p) for p in prompts]
        layer = model.n_layers if strategy is None else strategy.layer
        full = model.n_layers * of_full
        blocks = sum(
            layer * n + (model.n_layers - layer) * k for n, k in zip(whole, kept, strict=True)
        )
        row = {"strategy": name, "layer": layer, "keep": "all", "tokens": np.mean(whole)} | about
        return row | {"compute": blocks / full}, partial(
            score_answers,
            prompts,
            model=model,
            strategy=strategy,
            settings=sl.Settings(progress=False),
        )

    of_full = sum(map(len, prompts))
    yield scored("full model", prompts)
    # What tells most comes first, in case not all is measured.
    for layers in (LAYERS[1::2], LAYERS[::2]):
        for keep, rule in KEEPS.items():
            if layers == LAYERS[1::2]:
                yield scored("shorter prompt", [shorter(p, rule) for p in prompts], keep=keep)
            for layer in layers:
                yield scored("exit", prompts, ExitPrefill(layer, rule), keep=keep)
        fewer = shots // 2 if layers == LAYERS[1::2] else shots // 4
        few = task.prompts(model.tokenizer, n, shots=fewer, **options)
        yield scored(f"{fewer} demonstrations", few)


def shorter(prompt: sl.Prompt, keep: sl.Keep) -> sl.Prompt:
    """Return the kept tokens as a prompt of their own."""
    positions = sorted({*keep(prompt, len(prompt) - 1), len(prompt) - 1})
    return replace(
        prompt, tokens=tuple(prompt.tokens[p] for p in positions), answer=-1, spans={}, text=""
    )


def summary(scores: pd.DataFrame, full: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield one row per way of counting: accuracy, and the gain over the full model."""
    means = sl.stats.summarise(scores, COUNTS)
    for row in means.drop(columns="strategy").to_dict("records"):
        column = row["measure"].replace("accuracy", "correct")
        here, there = scores[column].astype(bool), full[column].astype(bool)
        gained, lost = int((here & ~there).sum()), int((there & ~here).sum())
        low, high = paired_interval(gained, lost, len(scores))
        yield (
            row
            | {
                "several": float((scores["n_tokens"] > 1).mean()),
                "ambiguous": float(scores["ambiguous"].mean()),
            }
            | {"gain": (gained - lost) / len(scores), "gain_low": low, "gain_high": high}
        )


def table(frame: pd.DataFrame) -> str:
    """Return the table of the documentation."""
    lines = ["| task | strategy | layer | kept | compute | first token | scored | generated |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    keys = ["task", "strategy", "layer", "keep", "compute"]
    frame["layer"] = frame["layer"].astype(int)
    for key, part in frame.sort_values(["task", "keep", "strategy", "layer"]).groupby(
        keys, sort=False
    ):
        by = part.set_index("measure")
        cells = [
            f"{by.loc[m, 'mean']:.2f} [{by.loc[m, 'low']:.2f}, {by.loc[m, 'high']:.2f}]"
            for m in (c.replace("correct", "accuracy") for c in COUNTS)
        ]
        lines.append("| " + " | ".join([*map(str, key[:4]), f"{key[4]:.2f}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
