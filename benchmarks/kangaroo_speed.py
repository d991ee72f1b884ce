"""How fast text is with the drafts of a saved adapter, beside the fastest plain greedy text.

On a CPU, one row, one thread, every strategy in turn, as in ``speculation.py``: ratios of processor
time by kind of prompt, above 1 where drafts are faster. The adapter may draft all tokens, or the
8192 of the lowest ids and those of the prompt.

    python benchmarks/kangaroo_speed.py --data FOLDER --adapter FOLDER [--n 8] [--tokens 64]

The table ``benchmarks/kangaroo_speed.csv`` is written after every kind.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import records
import speculation
import torch

import spade_lens as sl
from spade_lens.generation import Speculate, load_kangaroo
from spade_lens.generation.speculate import LOOKUPS
from spade_lens.storage import write_csv

OUT = Path(__file__).parent / "kangaroo_speed"
FEW = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what sl.load takes")
    parser.add_argument("--n", type=int, default=8, help="prompts of every kind")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load(args.model)
    kangaroo = load_kangaroo(args.adapter, model)
    # Byte-pair encoding numbers tokens by how common they are.
    few = replace(kangaroo, ids=torch.arange(FEW))
    strategies: dict[str, Any] = {
        "plain": None,
        "kangaroo, as long as pays": Speculate(kangaroo),
        "kangaroo of 8k tokens, 1 draft": Speculate(few, 1, adaptive=False),
        "kangaroo of 8k tokens, 2 drafts": Speculate(few, 2, adaptive=False),
        "kangaroo of 8k tokens, as long as pays": Speculate(few),
        "lookups, as long as pays": Speculate(),
        "lookups, then kangaroo of 8k tokens": Speculate((*LOOKUPS, few)),
    }
    about = {
        "run": records.circumstances(seed=speculation.SEED, threads=1, model=model.name),
        "layer": kangaroo.layer,
        **{key: kangaroo.about[key] for key in ("adapter", "tokens", "held_out")},
        **{"n": args.n, "new_tokens": args.tokens},
    }
    records.named(args.out, ".json").write_text(json.dumps(about, indent=1) + "\n")
    rows = []
    with sl.Settings(progress=False):
        for kind, prompts in speculation.kinds(args.data, model, args.n).items():
            for number, prompt in enumerate(prompts):
                for row in speculation.measure(
                    model, prompt, args.tokens, ours_alone=True, strategies=strategies
                ):
                    rows.append({"kind": kind, "prompt": number, **row})
                print(kind, number, flush=True)
            table = speculation.summary(pd.DataFrame(rows))
            write_csv(records.named(args.out, ".csv"), table)
            print(table.to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
