"""How often Kangaroo's drafts are right, by the number of tokens that its adapter was trained on.

The model writes text after prompts of many kinds, half of it greedy and half at temperature 1. An
adapter at a lower layer is trained on it, in several variants and on first parts of the text. It is
judged on prompts that are not among those: teacher-forced on their greedy text, whose next tokens
it should predict, and in the real loop. Controls are the model's own head at the layer (logit
lens) and the affine map of the ridge regression without attention. Learning rates are chosen on
held-out text of the training kind, never on the prompts that judge. For the table at hand that text
also chose the strength of the ridge regression; now a part of the text of training does.

    python benchmarks/kangaroo.py --data FOLDER --device cuda --budget-seconds 230 --save FOLDER

It writes ``benchmarks/kangaroo.csv``, a row at a time; runs that do not fit the budget are left out
and named. ``kangaroo_speed.py`` measures the speed of a saved adapter. FOLDER holds
``spec_bench/questions.jsonl`` and ``wikitext-2/{test,valid}.txt``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import records
import speculation
import torch
from kangaroo_prompts import training_prompts

import spade_lens as sl
from spade_lens.generation import Kangaroo, Speculate
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage import write_csv
from spade_lens.training import AdapterPlan, TrainPlan, own_text
from spade_lens.training.kangaroo import commonest, compare_predictions, fit_adapter, start_adapter
from spade_lens.training.streams import Streams

HERE = Path(__file__).parent
SIZES = (12_000, 50_000, 200_000, 1_000_000, 4_000_000)
VARIANTS = {
    "linear": AdapterPlan(),
    "diagonal": AdapterPlan(residual="diagonal"),
    "linear, fixed map": AdapterPlan(residual="ridge"),
    "linear, feed-forward": AdapterPlan(hidden=1536),
}
RATES = (5e-3, 1.5e-2, 4e-2)
"""Of Muon, which takes the matrices; AdamW takes the rest at a fifth of it."""
TUNED_ON = 200_000
FEW = 8192
PASSES = 4
VALIDATED_ON = 20_000
SHARE_OF_TEXT = 0.4
"""Of the seconds, for writing text."""


@dataclass(frozen=True)
class Judge:
    """A prompt that judges, and its greedy text.

    Args:
        kind: What the prompt is.
        n_prompt: Its length.
        text: The prompt and the text.
    """

    kind: str
    n_prompt: int
    text: sl.Prompt


class Table:
    """Rows, written as soon as they are known."""

    def __init__(self, out: Path, seed: int) -> None:
        self._out, self._seed = out, seed
        self._rows: list[dict[str, Any]] = []

    def add(self, kinds: Sequence[str], values: Sequence[float], **about: Any) -> None:
        """Add means over prompts: of every kind, and of all."""
        frame = pd.DataFrame({"kind": kinds, "value": values})
        parts = [*frame.groupby("kind", sort=False), ("all", frame)]
        for kind, part in parts:
            x = part["value"].dropna().to_numpy(dtype=np.float64)
            if not len(x):
                continue
            low, high = mean_interval(x) if len(x) > 1 else (np.nan, np.nan)
            row = {**about, "kind": kind, "value": x.mean(), "low": low, "high": high}
            self._rows.append({**row, "n": len(x), "seed": self._seed})
        table = pd.DataFrame(self._rows)
        write_csv(records.named(self._out, ".csv"), table.round(4))
        last = self._rows[-1]
        about = {key: value for key, value in about.items() if value is not None}
        print(f"{about}: {last['value']:.3f} [{last['low']:.3f}, {last['high']:.3f}]", flush=True)

    def write(self, about: dict[str, Any]) -> None:
        """Write what the rows rest on beside them."""
        records.named(self._out, ".json").write_text(json.dumps(about, indent=1) + "\n")


class Clock:
    """The seconds that are left of a budget."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what sl.load takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget-seconds", type=float, default=3600.0)
    parser.add_argument("--save", type=Path, help="where the best adapter of a layer goes")
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--tuned-on", type=int, default=TUNED_ON)
    parser.add_argument("--n", type=int, default=8, help="prompts of every kind that judge")
    parser.add_argument("--tokens", type=int, default=64, help="of the text that judges")
    parser.add_argument("--new", type=int, default=128, help="tokens written after a prompt")
    parser.add_argument("--texts-at-once", type=int, help="of 256 tokens, while text is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "kangaroo")
    args = parser.parse_args()
    clock = Clock(args.budget_seconds)
    cuda = args.device.startswith("cuda")
    model = sl.load(args.model, device=args.device)
    args.texts_at_once = args.texts_at_once or (2048 if cuda else 80)
    memory = 0.6 * torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 6.0
    with sl.Settings(progress=False, memory_limit=memory):
        acceptance(model, args, clock)


def acceptance(model: sl.Model, args: argparse.Namespace, clock: Clock) -> None:
    """Train all variants at all sizes as far as the budget goes, and judge them."""
    about: dict[str, Any] = {
        "run": records.circumstances(seed=args.seed, threads=1, model=model.name),
        "device": device_name(model),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "tuning": [],
        "left_out": [],
    }
    table = Table(args.out, args.seed)
    judges = list(judged_by(model, args))
    fast(True)
    pieces = write_text(model, args, clock)
    held_out = shortest(pieces, VALIDATED_ON)
    pieces = pieces[len(held_out) :]
    total = sum(map(len, pieces))
    about |= {"text": {"pieces": len(pieces), "tokens": total, "held_out": len(held_out)}}
    print(f"text: {about['text']}, {clock.left:.0f} s left", flush=True)
    sizes = [size for size in args.sizes if size < total / 1.3] + [total]
    for layer in args.layers:
        one_layer(model, layer, pieces, held_out, judges, sizes, table, args, clock, about)
        table.write(about)


def one_layer(
    model: sl.Model,
    layer: int,
    pieces: Sequence[sl.Prompt],
    held_out: Sequence[sl.Prompt],
    judges: Sequence[Judge],
    sizes: Sequence[int],
    table: Table,
    args: argparse.Namespace,
    clock: Clock,
    about: dict[str, Any],
) -> None:
    learned, test = Streams.of(model, layer, [*pieces, *held_out]).split(len(pieces))
    of_judges = [Streams.of(model, layer, [judge.text]) for judge in judges]
    names = [judge.kind for judge in judges]
    first = layer == args.layers[0]

    def judge_all(kangaroo: Kangaroo, **row: Any) -> float:
        fast(False)
        given = [judged(kangaroo, j, s) for j, s in zip(judges, of_judges, strict=True)]
        agreement, overlap = zip(*given, strict=True)
        table.add(names, agreement, measure="agreement", layer=layer, **row)
        table.add(names, overlap, measure="overlap", layer=layer, **row)
        fast(True)
        return float(np.mean(agreement))

    for name, made in (
        ("logit lens", AdapterPlan(residual="diagonal")),
        ("map alone", AdapterPlan()),
    ):
        start = start_adapter(model, learned.first(sizes[-1]), made).requires_grad_(False)
        judge_all(Kangaroo(model, layer, start), variant=name, tokens=None)

    seconds_a_step: dict[int, float] = {}  # by tokens of a step

    def fit(variant: str, size: int, rate: float) -> Kangaroo | None:
        some = learned.first(size)
        made = replace(VARIANTS[variant], batch_tokens=batch_tokens(model, some.n_tokens))
        plan = plan_of(some.n_tokens, made.batch_tokens, rate, args.seed)
        slowest = max(seconds_a_step.values(), default=0.0)
        needed = plan.steps * seconds_a_step.get(made.batch_tokens, slowest)
        if needed > clock.left - reserve(args):
            left_out = {"layer": layer, "variant": variant, "tokens": size, "seconds": needed}
            about["left_out"].append(left_out)
            print(f"left out: {left_out}", flush=True)
            return None
        began = time.monotonic()
        kangaroo = fit_adapter(model, layer, some, test, made, plan)
        taken = time.monotonic() - began
        seconds_a_step[made.batch_tokens] = taken / plan.steps
        held = kangaroo.about["held_out"]
        losses = kangaroo.about["history"]["validation_loss"]
        print(f"{layer} {variant} {size} {rate}: {taken:.1f} s, {held}, {losses[-1]:.3f}")
        row = {"layer": layer, "variant": variant, "tokens": size, "rate": rate, "seconds": taken}
        about["tuning"].append({**row, **held, "losses": losses, "steps": plan.steps})
        table.write(about)
        return kangaroo

    best_rate = {}
    on = min(args.tuned_on, sizes[-1])
    for variant in VARIANTS if first else ("linear", "linear, feed-forward"):
        tried = {}
        for rate in RATES if first else RATES[1:2]:
            kangaroo = fit(variant, on, rate)
            if kangaroo is not None:
                tried[rate] = kangaroo.about["held_out"]["agreement"]
        if tried:
            best_rate[variant] = max(tried, key=lambda rate: tried[rate])
    best: tuple[float, Kangaroo | None] = (-1.0, None)
    # The largest first, for the adapter that is kept.
    for size in sorted(sizes, reverse=True):
        for variant, rate in best_rate.items():
            if variant == "linear, fixed map" and size != on:
                continue  # tuning says enough
            kangaroo = fit(variant, size, rate)
            if kangaroo is None:
                continue
            value = judge_all(kangaroo, variant=variant, tokens=size, rate=rate)
            if value > best[0]:
                best = (value, kangaroo)
            few = commonest(pieces, FEW).to(model.device)
            if variant.startswith("linear") and size == max(sizes):
                judge_all(replace(kangaroo, ids=few), variant=f"{variant}, 8k tokens", tokens=size)
            if best[1] is kangaroo and args.save:
                kangaroo.save(args.save / f"{layer}")
                replace(kangaroo, ids=few).save(args.save / f"{layer}-few")
    if best[1] is not None:
        in_the_loop(model, best[1], judges, table, args)


def batch_tokens(model: sl.Model, n_tokens: int) -> int:
    """Tokens of a step: as many as a device likes, but never few steps."""
    most = 4096 if model.device.type == "cuda" else 1024
    return int(min(most, max(256, n_tokens // 48)))


def plan_of(n_tokens: int, batch: int, rate: float, seed: int) -> TrainPlan:
    steps = round(PASSES * n_tokens / batch)
    return TrainPlan(
        steps,
        learning_rate=rate / 5,
        matrix_rate=rate,
        betas=(0.9, 0.95),
        warmup=min(100, steps // 10),
        row_every=max(1, steps // 4),
        seed=seed,
    )


def reserve(args: argparse.Namespace) -> float:
    """Seconds that the real loop and the tables need."""
    return 0.06 * args.budget_seconds


def judged_by(model: sl.Model, args: argparse.Namespace) -> Iterator[Judge]:
    """The prompts that judge, and their greedy text."""
    for kind, prompts in speculation.kinds(args.data, model, args.n).items():
        written = sl.generate(prompts, args.tokens, model=model, stop=())
        for prompt, tokens in zip(prompts, written.tokens, strict=True):
            yield Judge(kind, len(prompt), sl.Prompt(tokens=(*prompt.tokens, *tokens)))


def judged(kangaroo: Kangaroo, judge: Judge, streams: Streams) -> tuple[float, float]:
    """How often the adapter predicts the greedy text of a prompt, and its mean overlap."""
    if kangaroo.ids is not None:
        own = torch.tensor(judge.text.tokens[: judge.n_prompt]).to(kangaroo.ids)
        kangaroo = replace(kangaroo, ids=torch.cat([kangaroo.ids, own]).unique())
    [(_, same, overlap)] = compare_predictions(kangaroo, streams)
    # The first token of a text has no figure; the last one predicts what was not written.
    new = slice(judge.n_prompt - 2, len(judge.text) - 2)
    return float(same[new].mean()), float(overlap[new].mean())


def write_text(model: sl.Model, args: argparse.Namespace, clock: Clock) -> list[sl.Prompt]:
    """Text of the model's own, until there is enough or its share of the budget is used."""
    pieces: list[sl.Prompt] = []
    stop = clock.left * (1 - SHARE_OF_TEXT)
    wanted = max(args.sizes) + min(VALIDATED_ON, max(args.sizes) // 10)
    per_text = args.new + 130  # a guess, for the number of prompts
    for turn in range(10_000):
        missing = wanted - sum(map(len, pieces))
        if missing <= 0 or (pieces and clock.left < stop):
            break
        n = min(args.texts_at_once, max(8, missing // per_text))
        seed = args.seed + 1000 * turn
        prompts = training_prompts(model, args.data, n, seed=seed, at_once=args.texts_at_once)
        written = own_text(model, prompts, args.new, at_once=args.texts_at_once, seed=seed)
        pieces += written.pieces
        print(f"text: {sum(map(len, pieces))} tokens, {clock.left:.0f} s left", flush=True)
    return pieces


def shortest(pieces: Sequence[sl.Prompt], n_tokens: int) -> list[sl.Prompt]:
    """First pieces of at most so many tokens, and at most a tenth of all."""
    most = min(n_tokens, sum(map(len, pieces)) // 10)
    ends = np.cumsum([len(piece) for piece in pieces])
    return list(pieces[: max(2, int((ends <= most).sum()))])


def in_the_loop(
    model: sl.Model,
    kangaroo: Kangaroo,
    judges: Sequence[Judge],
    table: Table,
    args: argparse.Namespace,
) -> None:
    """Acceptance and tokens a round when all drafts are verified, many prompts side by side."""
    fast(False)
    prompts = [sl.Prompt(tokens=judge.text.tokens[: judge.n_prompt]) for judge in judges]
    names = [judge.kind for judge in judges]
    for drafts, eta in ((3, 0.0), (6, 0.4)):
        strategy = Speculate(kangaroo, drafts, eta, adaptive=False)
        written = sl.generate(prompts, args.tokens, model=model, stop=(), strategy=strategy)
        rounds = pd.DataFrame(written.rounds.tolist(), columns=["prompt", "drafted", "accepted"])
        sums = rounds.groupby("prompt").sum()
        n_rounds = rounds.groupby("prompt").size()
        about = {"layer": kangaroo.layer, "variant": "best, in the loop", "drafts": drafts}
        about |= {"eta": eta, "tokens": kangaroo.about["tokens"]}
        values = {
            "acceptance": sums["accepted"] / sums["drafted"],
            "tokens per round": args.tokens / n_rounds,
            "same text": pd.Series(
                [
                    tuple(tokens) == judge.text.tokens[judge.n_prompt :]
                    for tokens, judge in zip(written.tokens, judges, strict=True)
                ]
            ),
        }
        for measure, of_prompts in values.items():
            table.add(names, [float(x) for x in of_prompts], measure=measure, **about)
    fast(True)


def fast(on: bool) -> None:
    """Let a GPU multiply in TF32, for text and training; what judges is exact float32."""
    torch.backends.cuda.matmul.allow_tf32 = on


def device_name(model: sl.Model) -> str:
    cuda = model.device.type == "cuda"
    return torch.cuda.get_device_name() if cuda else str(model.device)


if __name__ == "__main__":
    main()
