"""Heuristic-guided decoding beside its rivals: sentences that shall hold four or five given words.

On SmolLM2-135M-Instruct in fp32 on a CPU, one thread. Every arm writes one sentence for each set of
words in ``concepts.py``. *Coverage* is the fraction of the words that the sentence holds, *all* is
whether it holds all of them, *logprob* is the mean log-probability of its tokens under the model
after the same prompt. *Forwards* counts tokens that ran, in passes of the whole model, without the
prompt; *cpu* is the processor time of the call over that of greedy text of the same sets. Best of N
draws at temperature 1 and takes the first text with the highest coverage. N is the most whose
tokens are no more than the search's forwards, or whose time in one batch is no more than its.

Sets are run some at a time. Every finished group of an arm is kept in ``benchmarks/.deal``, so that
a run which is stopped goes on, and a partial table can be written: of the sets that the search has
written.

    python benchmarks/deal.py [--sets 40] [--group 8] [--minutes 15]
    python benchmarks/deal.py --print
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from concepts import SETS

import spade_lens as sl
from spade_lens.generation import Deal, Sampling
from spade_lens.generation.heuristics import BannedWords, KeywordCoverage, TextLength
from spade_lens.stats import paired_interval, proportion_interval
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.studies.fit import default_lens

OUT = Path(__file__).with_suffix(".csv")
KEPT = Path(__file__).parent / ".deal"
TOKENS = 32
STOP = ["\n"]
DRAWS = 12
REQUEST = "Write one short sentence that uses all of these words: {}."
PLAIN_REQUEST = "Write one short sentence about everyday life."
SEARCH = "deal"

LOOKING = {"k": 5, "lookahead": 6}
ARMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    SEARCH: LOOKING,
    "deal, no look-ahead": {"k": 5, "lookahead": 0},
    "best of N": {"draws": DRAWS},
    "deal, weight 0": {"weight": 0.0},
    "greedy, no words in the prompt": {"request": PLAIN_REQUEST},
    "deal, 3 at a time": {**LOOKING, "commit": 3},
    **{
        f"deal, logit lens at {layer}": {**LOOKING, "exit_layer": layer}
        for layer in (27, 24, 18, 12)
    },
    **{
        f"deal, L-SPADE at {layer}": {**LOOKING, "exit_layer": layer, "by_l_spade": True}
        for layer in (27, 24, 18)
    },
    "at most 8 words: greedy": {"heuristic": "length", "weight": 0.0},
    "at most 8 words: deal": {"heuristic": "length", **LOOKING},
    "no 'the': greedy": {"heuristic": "banned", "weight": 0.0},
    "no 'the': deal": {"heuristic": "banned", **LOOKING},
}
"""In the order of importance: a run that has no time left leaves out the last ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--group", type=int, default=8, help="sets that run side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more after")
    parser.add_argument("--print", action="store_true", help="only write the table again")
    args = parser.parse_args()
    if not args.print:
        measure(args)
    frame = pd.DataFrame(kept())
    write_csv(OUT, summary(frame))
    print(table(pd.read_csv(OUT)))


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = sl.load()
    about = {"tokens": TOKENS, "stop": STOP, "request": REQUEST, "sets": args.sets}
    about |= {"group": args.group, "draws": DRAWS, "seed": 0, "threads": 1}
    write_json(OUT.with_suffix(".json"), provenance(model, **about))
    KEPT.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    with sl.Settings(progress=False):
        for arm, options in ARMS.items():
            for first in range(0, args.sets, args.group):
                path = KEPT / f"{arm.replace(' ', '_')}-{first}.json".replace(":", "")
                if path.exists() or time.monotonic() > end:
                    continue
                numbers = range(first, min(first + args.group, args.sets))
                write_json(path, {"rows": of_group(model, arm, numbers, **options)})
                print(arm, first, flush=True)


def kept() -> list[dict[str, Any]]:
    """Return the rows of all groups that have been measured."""
    return [
        row for path in sorted(KEPT.glob("*.json")) for row in json.loads(path.read_text())["rows"]
    ]


def of_group(
    model: sl.Model,
    arm: str,
    numbers: Sequence[int],
    *,
    request: str = REQUEST,
    heuristic: str = "coverage",
    draws: int = 0,
    by_l_spade: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the rows of one arm on some sets of words."""
    sets = [SETS[i] for i in numbers]
    chats = [[{"role": "user", "content": request.format(", ".join(words))}] for words in sets]
    coverages = [KeywordCoverage(words) for words in sets]
    judges: list[Any] = {
        "coverage": coverages,
        "length": [TextLength(0, 8)] * len(sets),
        "banned": [BannedWords(["the"])] * len(sets),
    }[heuristic]
    if by_l_spade:
        options["lens"] = default_lens(model)
    strategy = Deal(judges, **options) if options else None
    times = max(1, draws)
    start = time.process_time()
    written = sl.generate(
        [chat for chat in chats for _ in range(times)],
        TOKENS,
        model=model,
        strategy=strategy,
        sampling=Sampling(seed=0) if draws else None,
        stop=STOP,
    )
    seconds = (time.process_time() - start) / len(sets)
    rows = []
    for at, text in enumerate(written.texts):
        row, logprobs = at // times, written.logprob[written.prompt == at]
        of_rounds = written.rounds[written.rounds[:, 0] == at]
        forwards = float(len(logprobs))
        if strategy is not None and strategy.weight and strategy.lookahead:
            ahead, share = int(of_rounds[:, 1].sum()), 1.0
            if strategy.exit_layer is not None:
                share = strategy.exit_layer / model.n_layers
            forwards = ahead * share + len(logprobs) * (1 - share)
        changed = []
        if written.greedy is not None:
            of_row = written.prompt == at
            changed = (written.greedy[of_row] != written.token[of_row]).nonzero()[:, 0].tolist()
        rows.append(
            {
                "arm": arm,
                "set": numbers[row],
                "draw": at % times,
                "coverage": coverages[row]("", text),
                "wish": judges[row]("", text),
                "logprob": float(logprobs.mean()),
                "tokens": len(logprobs),
                "forwards": forwards,
                "cpu_seconds": seconds,
                "text": text,
                "token_ids": list(written.tokens[at]),
                "changed": changed,
            }
        )
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for every arm, with paired intervals of its difference from greedy text."""
    frame = with_best_of(frame[frame["set"].isin(frame.loc[frame["arm"] == SEARCH, "set"])])
    greedy = frame[frame["arm"] == "greedy"].set_index("set")
    rows = []
    order = [*list(ARMS)[:3], "best of N, equal forwards", "best of N, equal time", *list(ARMS)[4:]]
    for arm in (arm for arm in order if arm in set(frame["arm"])):
        part = frame[frame["arm"] == arm].set_index("set")
        base = greedy
        if ":" in arm:  # another wish, beside greedy text that is judged by it
            base = frame[frame["arm"] == arm.replace(": deal", ": greedy")].set_index("set")
        both = part.join(base.add_suffix("_base"), how="inner")
        n, done = len(both), both["coverage"] == 1
        row: dict[str, Any] = {"arm": arm, "n": len(part), "n_paired": n}
        for column in ("coverage", "wish", "logprob", "tokens", "forwards"):
            row[column] = part[column].mean()
        for column in ("coverage", "wish", "logprob"):
            gain = (both[column] - both[f"{column}_base"]).to_numpy(dtype=float)
            low, high = mean_interval(gain)
            row |= {f"{column}_gain": gain.mean(), f"{column}_gain_low": low}
            row[f"{column}_gain_high"] = high
        base_done = both["coverage_base"] == 1
        row["all"] = float((part["coverage"] == 1).mean())
        row["all_low"], row["all_high"] = proportion_interval(
            int((part["coverage"] == 1).sum()), len(part)
        )
        row["all_gain"] = float(done.mean() - base_done.mean())
        lost, gained = int((done & ~base_done).sum()), int((base_done & ~done).sum())
        row["all_gain_low"], row["all_gain_high"] = paired_interval(lost, gained, n)
        row["forwards_ratio"] = both["forwards"].sum() / both["forwards_base"].sum()
        row["cpu_ratio"] = both["cpu_seconds"].sum() / both["cpu_seconds_base"].sum()
        row["same_as_greedy"] = float(np.mean(both["token_ids"] == both["token_ids_base"]))
        row["changed"] = part["changed"].map(len).mean()
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def with_best_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the best of as many draws as a search's forwards and time allow."""
    drawn, rest = frame[frame["arm"] == "best of N"], frame[frame["arm"] != "best of N"]
    search = frame[frame["arm"] == SEARCH].set_index("set")
    chosen = []
    for number, part in drawn.groupby("set"):
        if number not in search.index:
            continue
        part, limit = part.sort_values("draw"), search.loc[number]
        spent = part["forwards"].cumsum()
        by_forwards = max(1, int((spent <= limit["forwards"]).sum()))
        share = limit["cpu_seconds"] / part["cpu_seconds"].iloc[0]
        by_time = min(len(part), max(1, int(share * len(part))))
        for name, n in (("forwards", by_forwards), ("time", by_time)):
            some = part.iloc[:n]
            best = some.loc[some["coverage"].idxmax()].copy()
            best["arm"] = f"best of N, equal {name}"
            best["forwards"] = some["forwards"].sum()
            best["cpu_seconds"] = part["cpu_seconds"].iloc[0] * n / len(part)
            chosen.append(best)
    return pd.concat([rest, pd.DataFrame(chosen)], ignore_index=True) if chosen else rest


def table(frame: pd.DataFrame) -> str:
    """Return the tables of the documentation: of coverage, and of the other wishes."""
    other = frame["arm"].str.contains(":")
    return "\n\n".join(
        _table(rows, measure)
        for rows, measure in ((frame[~other], "coverage"), (frame[other], "wish"))
        if len(rows)
    )


def _table(frame: pd.DataFrame, measure: str) -> str:
    lines = [
        f"| | n | {measure} | gain over greedy | all words | log P a token | difference "
        "| forwards | CPU time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.to_dict("records"):
        gain, diff = (
            f"{row[f'{c}_gain']:+.2f} [{row[f'{c}_gain_low']:+.2f}, {row[f'{c}_gain_high']:+.2f}]"
            for c in (measure, "logprob")
        )
        lines.append(
            f"| {row['arm']} | {row['n']} | {row[measure]:.2f} | {gain} | {row['all']:.2f} "
            f"| {row['logprob']:.2f} | {diff} | {row['forwards']:.0f} | {row['cpu_ratio']:.1f} x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
