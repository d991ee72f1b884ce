"""Whether greedy text is the same text: beside Hugging Face's, and with drafts beside plain text.

On SmolLM2-135M-Instruct in fp32 on a CPU, one thread. Texts of ours are written side by side, those
of Hugging Face one by one, and both end at the model's own end of text. At the first token that
differs the margin is how many nats likelier one token is than the other, under the model. Below
1e-3 it is a tie but for rounding.

    python benchmarks/identity.py --data FOLDER [--n 25] [--drafted 10] [--tokens 64]

``--n`` is prompts of every kind for the comparison with Hugging Face, ``--drafted`` of every kind
for drafts. The table has a row for every comparison; the JSON names every difference. FOLDER holds
``spec_bench/questions.jsonl`` and ``wikitext-2/valid.txt``.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from speculation import SEED, kinds

import spade_lens as sl
from spade_lens.generation import LayerExit, PromptLookup, Speculate, score_text
from spade_lens.stats.intervals import proportion_interval

OUT = Path(__file__).parent / "identity.csv"
MOST_TOKENS = 1000
TIE = 1e-3

STRATEGIES = [
    Speculate(),
    Speculate([PromptLookup(3), LayerExit(24)], 4, 0.5, adaptive=False),
    *(
        Speculate(LayerExit(layer), drafts, eta, adaptive=False)
        for layer, drafts, eta in ((24, 1, 0.0), (8, 2, 0.0), (16, 4, 0.4))
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n", type=int, default=25, help="prompts of every kind, Hugging Face")
    parser.add_argument("--drafted", type=int, default=10, help="prompts of every kind, drafts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load()
    by_kind = kinds(args.data, model, max(args.n, args.drafted), MOST_TOKENS)
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []

    def add(what: str, prompts: Sequence[sl.Prompt], ours: Any, expected: Any) -> None:
        differ = differences_of(model, prompts, ours, expected)
        differences.extend({"comparison": what} | one for one in differ)
        rows.append(row_of(what, prompts, ours, differ))
        table = pd.DataFrame(rows)
        print(table.tail(1).to_string(index=False), flush=True)
        for one in differ:
            print(one, flush=True)
        table.to_csv(args.out, index=False)

    with sl.Settings(progress=False):
        every = [p for prompts in by_kind.values() for p in prompts[: args.n]]
        ours = sl.generate(every, args.tokens, model=model).tokens
        hugging_face = [theirs(model, prompt, args.tokens) for prompt in every]
        add("plain text, and Hugging Face's generate", every, ours, hugging_face)
        some = [p for prompts in by_kind.values() for p in prompts[: args.drafted]]
        plain = sl.generate(some, args.tokens, model=model, stop=()).tokens
        for strategy in STRATEGIES:
            start = time.perf_counter()
            drafted = sl.generate(some, args.tokens, model=model, stop=(), strategy=strategy)
            add(f"{strategy.name}, and plain text", some, drafted.tokens, plain)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    about = {"model": model.name, "seed": SEED, "threads": 1, "torch": torch.__version__}
    about |= {"tokens": args.tokens, "n": args.n, "drafted": args.drafted}
    about |= {"longest_prompt": MOST_TOKENS, "tie": TIE, "differences": differences}
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def theirs(model: sl.Model, prompt: sl.Prompt, n: int) -> list[int]:
    """New tokens by Hugging Face's ``generate``."""
    ids = torch.tensor([prompt.tokens])
    written = model.original.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = written[0, ids.shape[1] :].tolist()
    return tokens


def differences_of(
    model: sl.Model, prompts: Sequence[sl.Prompt], ours: Any, expected: Any
) -> list[dict[str, Any]]:
    """The first differing token of every text that differs, and its margin under the model."""
    found = []
    for i, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        if list(mine) == list(other):
            continue
        pairs = zip(mine, other, strict=False)
        step = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
        if step == min(len(mine), len(other)):  # one ended, and the other went on
            found.append({"prompt": i, "step": step, "margin": float("inf")})
            continue
        before = sl.Prompt(tokens=(*prompts[i].tokens, *other[:step]))
        scores = score_text([before] * 2, [[mine[step]], [other[step]]], model=model)
        first, second = scores["logprob"].tolist()
        found.append({"prompt": i, "step": step, "margin": abs(first - second)})
    return found


def row_of(
    what: str, prompts: Sequence[sl.Prompt], ours: Any, differ: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    n, same = len(prompts), len(prompts) - len(differ)
    low, high = proportion_interval(same, n)
    margins = [one["margin"] for one in differ]
    row = {"comparison": what, "n": n, "new_tokens": sum(map(len, ours)), "identical": same}
    row |= {"fraction": same / n, "fraction_low": round(low, 3), "fraction_high": round(high, 3)}
    row |= {"ties": sum(margin < TIE for margin in margins)}
    return row | {"largest_margin": max(margins, default=float("nan"))}


if __name__ == "__main__":
    main()
