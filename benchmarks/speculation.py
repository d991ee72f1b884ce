"""How fast drafted text is beside the fastest plain greedy text, by kind of prompt.

On SmolLM2-135M-Instruct in fp32 on a CPU, one row, one thread. Every prompt is written several
times in turn: plain, with lookups whose drafts are as long as pays, with lookups of fixed length,
and by Hugging Face's ``generate``, plain, with its own prompt lookup and with its own drafts from
an exit. Ratios are of processor time, plain over the other, above 1 where the other is faster: of
the whole call, and of what comes after the prompt has run. Every text must have the tokens of the
plain one. Kinds of prompts stand apart, since greedy text of a small model repeats itself and
flatters lookups.

    python benchmarks/speculation.py --data FOLDER [--n 8] [--tokens 64] [--ours | --peers]
    python benchmarks/speculation.py --data FOLDER --combined [--n 8]
    python benchmarks/speculation.py --costs 30

The table is written after every kind. ``--ours`` leaves out Hugging Face and the untrained exit,
which take most of the time. ``--peers`` leaves out what of ours is not the default. ``--combined``
compares several drafters in a row with the best of them by itself. ``--costs``
writes what a pass over a few tokens costs, which decides how long drafts are. FOLDER holds
``spec_bench/questions.jsonl`` and ``wikitext-2/valid.txt``.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from scipy.stats import quantile_test

import spade_lens as sl
from spade_lens.generation import LayerExit, PromptLookup, Speculate
from spade_lens.generation.draft_length import STEPS
from spade_lens.generation.speculate import LOOKUPS
from spade_lens.models.cache import TokenCache
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance

HERE = Path(__file__).parent
OUT = HERE / "speculation.csv"
COSTS = HERE / "speculation-costs.csv"
MOST_TOKENS = 1000
MOST_IN_A_PASS = 12
PACKED = 8
"""Rounds after which all weights have oneDNN's layout; they are not counted."""
SEED = 0

STRATEGIES: dict[str, Any] = {
    "plain": None,
    "lookups, as long as pays": Speculate(),
    "lookup of 3, 5 drafts": Speculate(PromptLookup(3), 5, adaptive=False),
    "exit at 8, 3 drafts": Speculate(LayerExit(8), 3, adaptive=False),
}
SINGLE: dict[str, Any] = {
    **{f"lookup of {n}, as long as pays": Speculate(PromptLookup(n)) for n in (2, 4)},
    "exit at 4, as long as pays": Speculate(LayerExit(4)),
}
COMBINED: dict[str, Any] = {
    "lookups, as long as pays": Speculate(),
    "lookups, then exit at 4, as long as pays": Speculate((*LOOKUPS, LayerExit(4))),
}
"""The lookups of 6 to 1 tokens, and these with a drafter that is never worth its time."""
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Hugging Face": {},
    "Hugging Face, prompt lookup": {"prompt_lookup_num_tokens": 5},
    "Hugging Face, exit at 8": {"assistant_early_exit": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--n", type=int, default=8, help="prompts of every kind")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ours", action="store_true", help="plain text and lookups alone")
    parser.add_argument("--peers", action="store_true", help="our default and Hugging Face alone")
    parser.add_argument("--combined", action="store_true", help="drafters alone and combined")
    parser.add_argument("--turns", type=int, default=2, help="times every call is made")
    parser.add_argument("--most-tokens", type=int, default=MOST_TOKENS, help="of a prompt")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--costs", type=int, metavar="ROUNDS", help="time passes alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load()
    if args.costs:
        with torch.no_grad():
            table = costs(model, args.costs)
        write_csv(COSTS, table)
        about = provenance(model, seed=SEED, threads=1, rounds=args.costs, cached=200)
        write_json(COSTS.with_suffix(".json"), about)
        print(table.to_string(index=False))
        return
    assert args.data is not None, "--data is needed"
    rows = []
    options: dict[str, Any] = {"turns": args.turns}
    if args.combined:
        args.ours, args.out = True, HERE / "speculation-combined.csv"
        options["strategies"] = {"plain": None} | SINGLE | COMBINED
    elif args.peers:
        options["strategies"] = {name: STRATEGIES[name] for name in list(STRATEGIES)[:2]}
    with sl.Settings(progress=False):
        for kind, prompts in kinds(args.data, model, args.n, args.most_tokens).items():
            for number, prompt in enumerate(prompts):
                for row in measure(model, prompt, args.tokens, ours_alone=args.ours, **options):
                    rows.append({"kind": kind, "prompt": number} | row)
                print(kind, number, flush=True)
            table = (beside_single if args.combined else summary)(pd.DataFrame(rows))
            table.to_csv(args.out, index=False)
            print(table.to_string(index=False), flush=True)
    arguments = {name: str(value) for name, value in vars(args).items()}
    about = provenance(model, seed=SEED, threads=1, arguments=arguments)
    write_json(args.out.with_suffix(".json"), about)


def kinds(
    folder: Path, model: sl.Model, n: int, most: int = MOST_TOKENS
) -> dict[str, list[sl.Prompt]]:
    """Prompts of at most so many tokens by kind, drawn with a seed."""
    lines = (folder / "spec_bench" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    texts = [
        text.strip()
        for text in (folder / "wikitext-2" / "valid.txt").read_text(encoding="utf-8").split("\n")
        if len(text) > 1200
    ]
    draws = np.random.default_rng(SEED)
    documents, other = ("summarization", "rag"), ("translation", "qa", "math_reasoning")
    chats = [q for q in questions if q["category"] not in (*documents, *other)]

    def chosen(given: list[Any]) -> Iterator[Any]:
        return (given[i] for i in draws.permutation(len(given)))

    def ask(text: str) -> Any:
        return [{"role": "user", "content": text}]

    said: dict[str, Iterator[Any]] = {
        "chat": (ask(q["turns"][0]) for q in chosen(chats)),
        "documents": (
            ask(q["turns"][0]) for q in chosen([q for q in questions if q["category"] in documents])
        ),
        "copying": (
            ask(f"{text[:900]}\n\nRepeat the text above word for word.") for text in chosen(texts)
        ),
        "free text": (text[:1000] for text in chosen(texts)),
    }
    found = {}
    for kind, given in said.items():
        fitting = (p for one in given for p in model.prompts([one]) if len(p) <= most)
        found[kind] = [prompt for prompt, _ in zip(fitting, range(n), strict=False)]
    return found


def measure(
    model: sl.Model,
    prompt: sl.Prompt,
    n: int,
    *,
    ours_alone: bool,
    strategies: Mapping[str, Any] = STRATEGIES,
    turns: int = 2,
) -> Iterator[dict[str, Any]]:
    """Run every strategy on one prompt in turns, for ``n`` tokens and for one."""
    ids = torch.tensor([prompt.tokens])
    runs: dict[str, Callable[[int], tuple[Any, Any]]] = {}
    for name, strategy in strategies.items():
        if ours_alone and name == "exit at 8, 3 drafts":
            continue
        runs[name] = lambda m, s=strategy: ours(model, prompt, m, s)
    for name, options in ({} if ours_alone else HUGGING_FACE).items():
        runs[name] = lambda m, o=options: (theirs(model, ids, m, o), None)
    seconds: dict[tuple[str, int], float] = {}
    results: dict[str, tuple[Any, Any]] = {}
    for m in (n, 1) * turns:
        for name, run in runs.items():
            start = time.thread_time()
            results[name if m == n else ""] = run(m)
            taken = time.thread_time() - start
            seconds[name, m] = min(taken, seconds.get((name, m), taken))
    plain = results["plain"][0]
    for name in runs:
        tokens, written = results[name]
        yield {
            "strategy": name,
            "same_tokens": tokens == plain,
            "acceptance": float("nan") if written is None else written.acceptance,
            "tokens_per_round": float("nan") if written is None else written.tokens_per_round,
            "seconds": seconds[name, n],
            "seconds_of_one": seconds[name, 1],
        }


def ours(model: sl.Model, prompt: sl.Prompt, n: int, strategy: Any) -> tuple[Any, Any]:
    """New tokens and what was written."""
    written = sl.generate(prompt, n, model=model, strategy=strategy, stop=())
    return list(written.tokens[0]), written


def theirs(model: sl.Model, ids: torch.Tensor, n: int, options: dict[str, Any]) -> list[int]:
    """New tokens by Hugging Face's ``generate``."""
    written = model.original.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = written[0, ids.shape[1] :].tolist()
    return tokens


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Geometric means of the prompts' ratios by kind, with Student's interval of the logarithms."""
    rows = []
    pooled = frame.assign(kind="all", prompt=frame["kind"] + frame["prompt"].astype(str))
    for kind, part in pd.concat([frame, pooled]).groupby("kind", sort=False):
        plain = part[part["strategy"] == "plain"].set_index("prompt")
        for name, alone in part.groupby("strategy", sort=False):
            own = alone.set_index("prompt").loc[plain.index]
            row = {"kind": kind, "strategy": name, "n": len(own)}
            whole = (plain["seconds"], own["seconds"])
            after = tuple(x["seconds"] - x["seconds_of_one"] for x in (plain, own))
            for column, (base, other) in {"speedup": whole, "speedup_after": after}.items():
                ratios = np.log((base / other).to_numpy())
                low, high = mean_interval(ratios) if len(ratios) > 1 else (np.nan, np.nan)
                row |= {
                    column: np.exp(ratios.mean()),
                    f"{column}_low": np.exp(low),
                    f"{column}_high": np.exp(high),
                }
            row |= {
                "verdict": verdict(row["speedup_low"], row["speedup_high"]),
                "same_tokens": own["same_tokens"].mean(),
                "acceptance": own["acceptance"].mean(),
                "tokens_per_round": own["tokens_per_round"].mean(),
            }
            rows.append(row)
    return pd.DataFrame(rows).round(3)


def beside_single(frame: pd.DataFrame) -> pd.DataFrame:
    """Every combination beside the single drafter that is fastest on the same kind of prompts.

    The fastest one is chosen on these prompts, which flatters it. The first rows are those of
    ``summary``; ``over_best`` is the single one's time after the prompt over the combination's.
    """
    table = summary(frame).drop(columns="verdict")
    pooled = frame.assign(kind="all", prompt=frame["kind"] + frame["prompt"].astype(str))
    after = pd.concat([frame, pooled]).assign(
        after=lambda t: np.log(t["seconds"] - t["seconds_of_one"])
    )
    for kind, part in after.groupby("kind", sort=False):
        logs = part.pivot(index="prompt", columns="strategy", values="after")
        best = logs[list(SINGLE)].mean().idxmin()
        for name in COMBINED:
            ratios = (logs[best] - logs[name]).to_numpy()
            ends = mean_interval(ratios) if len(ratios) > 1 else (np.nan, np.nan)
            row = (table["kind"] == kind) & (table["strategy"] == name)
            table.loc[row, "best_single"] = best
            columns = ["over_best", "over_best_low", "over_best_high"]
            table.loc[row, columns] = np.exp([ratios.mean(), *ends]).round(3)
    return table


def verdict(low: float, high: float) -> str:
    """What the interval of a whole call's speed says beside plain text."""
    return "faster" if low > 1 else "slower" if high < 1 else "undecided"


def costs(model: sl.Model, rounds: int) -> pd.DataFrame:
    """What a pass over a few tokens costs, in passes over one, after 200 tokens.

    In every round each length has its turn after a pass over one token, in an order drawn anew.
    Medians over rounds, with the interval that the test of a median gives.
    """
    decoder = model.structure.for_few_rows(packed=True)
    assert decoder is not None
    cache = TokenCache(1, 300, model.device)
    tokens = torch.arange(200)[None] + 100
    positions = torch.arange(200)[None]
    resid = decoder.embed(tokens, positions)
    decoder.run_blocks(resid, positions, 0, model.n_layers, cache=cache)
    cache.keep(positions, [200])

    def seconds(n: int) -> float:
        at = torch.arange(200, 200 + n)[None]
        start = time.thread_time()
        resid = decoder.embed(tokens[:, :n], at)
        resid = decoder.run_blocks(resid, at, 0, model.n_layers, cache=cache)
        decoder.unembed(decoder.final_norm(resid[0]))
        return time.thread_time() - start

    lengths = list(range(1, MOST_IN_A_PASS + 1))
    taken: dict[int, list[float]] = {n: [] for n in lengths}
    draws = np.random.default_rng(SEED)
    for number in range(rounds + PACKED):
        for n in draws.permutation(lengths).tolist():
            one, own = seconds(1), seconds(n)
            if number >= PACKED:
                taken[n].append(own / one)
    rows = []
    for n, ratios in taken.items():
        ends = quantile_test(ratios, p=0.5).confidence_interval()
        row = {"n_tokens": n, "n": len(ratios), "cost": np.median(ratios)}
        rows.append(row | {"cost_low": ends.low, "cost_high": ends.high, "assumed": STEPS[n - 1]})
    return pd.DataFrame(rows).round(3)


if __name__ == "__main__":
    main()
