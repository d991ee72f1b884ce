"""How well text goes on after an exit from the prompt, and how much of the prefill that saves.

On SmolLM2-135M-Instruct in fp32 with one thread. Each configuration is compared with the full
model: does it give the same next token (teacher-forced), and how far is its distribution? The
control is the full model on a shorter prompt. Appends to ``exit_prefill.csv`` what it has not got,
draws the figure and prints what is new. Shortcuts are fitted once and kept in
``benchmarks/.exit-prefill``.

    python benchmarks/exit_prefill.py [--part NAME ...] [--quick]
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from exit_prefill_figure import draw
from timing import timed
from torch import Tensor

import spade_lens as sl
from spade_lens.generation import ExitPrefill, Shortcuts, load_shortcuts
from spade_lens.generation.scoring import forced_logits
from spade_lens.generation.shortcuts import fit_several
from spade_lens.lenses.fitting.text import calibration_text
from spade_lens.models.backbone import KeyValueCache
from spade_lens.prompts import Prompt
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"
KEPT = HERE / ".exit-prefill"
OUT = HERE / "exit_prefill.csv"
KEYS = ["strategy", "layer", "keep"]
FITTED_ON = 12  # questions of a kind
NEW = 32  # tokens that follow a prompt

LAYERS = (22, 23, 24)
MAP_COST = 2 * 576 * 192 / 3_539_000
"""Weights of the projections to keys and values, over those of a block."""


@dataclass(frozen=True)
class Way:
    """One configuration: what runs of a prompt.

    Args:
        kind: ``dropped`` or ``mapped``, after what becomes of tokens that are not kept; ``shorter``
            for the full model on the end of the prompt.
        layer: The exit.
        keep: The rule for what goes on, and how many tokens.
        size: How many, or which fraction of the prompt.
    """

    kind: str
    layer: int
    keep: str
    size: float

    def compute(self, n: int, kept: int) -> float:
        """Return the blocks that run, in tokens, over those of the full model."""
        if self.kind == "shorter":
            return kept / n
        rest = MAP_COST * (n - kept) if self.kind == "mapped" else 0
        return (self.layer * n + (30 - self.layer) * (kept + rest)) / (30 * n)

    def cache(self, n: int, kept: int) -> float:
        """Return the cached tokens of all blocks over those of the full model."""
        if self.kind == "shorter":
            return kept / n
        return (
            1.0 if self.kind == "mapped" else (self.layer * n + (30 - self.layer) * kept) / 30 / n
        )


DROPPED = [Way("dropped", 21, "last", 64), Way("dropped", 24, "last", 64)]
MAPPED = [*(Way("mapped", layer, "last", 8) for layer in LAYERS), Way("mapped", 24, "last", 64)]
SHORTER = [Way("shorter", 0, "last", fraction) for fraction in (0.75, 0.84)]
"""As much compute as the mapped ones at layers 22 and 24 with the last 8 kept, or nearly."""

MORE = [
    *(Way("dropped", layer, "last", 128) for layer in (15, 18, 21, 24, 27)),
    *(Way("dropped", layer, "attention", 128) for layer in (18, 21, 24)),
    *(Way("dropped", layer, "sentences", 128) for layer in (21, 24)),
    *(Way("shorter", 0, "last", k) for k in (64, 128)),
]
"""Measured on the longer pieces of WikiText only."""


def main() -> None:
    parts: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "wikitext 256": partial(texts, n_tokens=256),
        "wikitext 450": partial(texts, n_tokens=450),
        "summarization": partial(questions, category="summarization"),
        "rag": partial(questions, category="rag"),
        "time 450": partial(times, n_tokens=450),
        "time 900": partial(times, n_tokens=900),
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=tuple(parts), action="append", help="repeatable")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data")
    parser.add_argument("--samples", type=int, default=24, help="texts of a part")
    parser.add_argument("--questions", type=int, default=12, help="of a kind")
    parser.add_argument("--rounds", type=int, default=6, help="of the timing")
    parser.add_argument("--quick", action="store_true", help="few texts, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.questions, args.rounds = 2, 2, 2
    torch.set_num_threads(1)
    model = sl.load()
    args.known = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame(columns=["data", *KEYS])
    shortcuts = fitted(model, args.data)
    fits = {str(layer): dict(s.about) for layer, s in shortcuts.items()}
    arguments = {key: str(value) for key, value in vars(args).items() if key != "known"}
    about = provenance(model, arguments=arguments, threads=1) | {"shortcuts": fits}
    before = json.loads(OUT.with_suffix(".json").read_text()) if OUT.exists() else {}
    runs = [*before.get("runs", [before] if before else []), about]  # rows are of several runs
    for name in args.part or parts:
        args.name = name
        with torch.no_grad():
            rows = pd.DataFrame(
                [{"data": name} | row for row in parts[name](model, shortcuts, args)]
            )
        print(rows.to_string(index=False), flush=True)
        if not args.quick:
            args.known = pd.concat([args.known, rows], ignore_index=True)
            write_csv(OUT, args.known)
            write_json(OUT.with_suffix(".json"), {"runs": runs})
            draw(args.known)


def wanted(args: argparse.Namespace, ways: Sequence[Way]) -> list[Way]:
    """Return the configurations that the table has not got for this part."""
    if args.quick:
        return list(ways)
    part = args.known[args.known["data"] == args.name]
    known = {tuple(map(str, key)) for key in part[KEYS].astype(object).fillna("").to_numpy()}
    return [way for way in ways if tuple(map(str, described(way).values())) not in known]


def fitted(model: sl.Model, data: Path) -> dict[int, Shortcuts]:
    """Return shortcuts fitted on text that nothing here is measured on: WikiText and questions."""
    missing = [layer for layer in LAYERS if not (KEPT / str(layer)).exists()]
    if missing:
        source = data / "wikitext-2" / "test.txt"
        pieces = list(calibration_text(model, source, n_pieces=20, n_tokens=512).pieces)
        for category in ("summarization", "rag"):
            pieces += asked(model, data, category)[-FITTED_ON:]
        for shortcuts in fit_several(model, missing, pieces):
            shortcuts.save(KEPT / str(shortcuts.layer))
    return {layer: load_shortcuts(KEPT / str(layer), model) for layer in LAYERS}


def asked(model: sl.Model, data: Path, category: str) -> list[Prompt]:
    """Return Spec-Bench's questions of 400 to 900 tokens, as the user's turn of a chat."""
    lines = (data / "spec_bench" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [q["turns"][0] for q in map(json.loads, lines) if q["category"] == category]
    prompts = model.prompts([[{"role": "user", "content": text}] for text in texts])
    return [prompt for prompt in prompts if 400 <= len(prompt) <= 900]


# -- next tokens


def texts(
    model: sl.Model, shortcuts: dict[int, Shortcuts], args: argparse.Namespace, n_tokens: int
) -> list[dict[str, Any]]:
    """Measure on pieces of WikiText's validation text, at equal distances."""
    ids = wikitext(model, args.data)
    step = (len(ids) - n_tokens - NEW) // args.samples
    cuts = [(at, at + n_tokens) for at in range(0, args.samples * step, step)]
    cut = [(ids[at:end], ids[end : end + NEW]) for at, end in cuts]
    more = MORE if n_tokens == 450 else []
    return measured(model, shortcuts, cut, wanted(args, [*DROPPED, *MAPPED, *SHORTER, *more]))


def wikitext(model: sl.Model, data: Path) -> list[int]:
    text = (data / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    return list(model.tokenizer(text[:600_000], add_special_tokens=False)["input_ids"])


def questions(
    model: sl.Model, shortcuts: dict[int, Shortcuts], args: argparse.Namespace, category: str
) -> list[dict[str, Any]]:
    """Measure on what the full model answers to Spec-Bench questions of 400 to 900 tokens."""
    every = asked(model, args.data, category)
    prompts = every[: min(args.questions, len(every) - FITTED_ON)]  # others than were fitted on
    written = [sl.generate(p, NEW, model=model, stop=()).tokens[0] for p in prompts]
    cut = [(list(p.tokens), list(t)) for p, t in zip(prompts, written, strict=True)]
    return measured(model, shortcuts, cut, wanted(args, [*DROPPED, *MAPPED, *SHORTER]))


def measured(
    model: sl.Model,
    shortcuts: dict[int, Shortcuts],
    pieces: Sequence[tuple[list[int], list[int]]],
    ways: Sequence[Way],
) -> list[dict[str, Any]]:
    found: dict[Way, list[tuple[float, ...]]] = {way: [] for way in ways}
    for number, (prompt, new) in enumerate(pieces):
        for way, figures in compared(model, shortcuts, prompt, new, ways, check=number == 0):
            found[way].append(figures)
    rows = []
    for way, of_way in found.items():
        agrees, kl, compute, cache = np.array(of_way).T
        agreement, divergence = bootstrap_interval(agrees), bootstrap_interval(kl)
        rows.append(
            described(way)
            | {"n": len(kl), "tokens": round(float(np.mean([len(p) for p, _ in pieces])))}
            | {"compute": compute.mean(), "cache": cache.mean(), "agreement": agrees.mean()}
            | {"agreement_low": agreement[0], "agreement_high": agreement[1], "kl": kl.mean()}
            | {"kl_low": divergence[0], "kl_high": divergence[1]}
        )
    return rows


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """A percentile interval over pieces, as the tables were measured; of 24 it covers .92 or so."""
    draws = np.random.default_rng(0).choice(values, size=(2000, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def described(way: Way) -> dict[str, Any]:
    kept = f"{way.keep} {way.size:g}" if way.size else way.keep
    return {"strategy": way.kind, "layer": float(way.layer) if way.layer else "", "keep": kept}


def compared(
    model: sl.Model,
    shortcuts: dict[int, Shortcuts],
    prompt: list[int],
    new: list[int],
    ways: Sequence[Way],
    *,
    check: bool,
) -> Iterator[tuple[Way, tuple[float, ...]]]:
    """Yield how each way compares with the full model on the tokens that follow one prompt.

    All ways share one run of the full model: below its exit, a way is the full model.
    """
    n, m = len(prompt), len(new)
    tokens = torch.tensor([[*prompt, *new[:-1]]])
    positions = torch.arange(tokens.shape[1])[None]
    resid: dict[int, Tensor] = {0: model.embed(tokens)}

    def record(layer: int, at_layer: Tensor) -> None:
        resid[layer] = at_layer

    model.run_blocks(resid[0], positions, 0, model.n_layers, after_block=record)
    full = model.logits(resid[model.n_layers][0, -m:]).log_softmax(dim=-1)
    for way in ways:
        kept = kept_by(model, way, tokens[0, :n], resid)
        columns = [*kept, *range(n, tokens.shape[1])]
        cache = None
        if way.kind == "mapped":
            rest = sorted(set(range(n)) - set(kept))
            start = resid[way.layer][:, rest]
            pieces = model.structure.having_blocks(shortcuts[way.layer].keys_alone)
            assert pieces is not None
            made = pieces.cached_tokens(positions[:, rest], lambda _, start=start: start)
            cache = KeyValueCache(made)
        high = model.run_blocks(
            resid[way.layer][:, columns], positions[:, columns], way.layer, 30, cache=cache
        )
        logits = model.logits(high[0, -m:])
        if check and way.kind != "shorter":
            strategy = ExitPrefill(
                way.layer, lambda *_, kept=kept: kept, shortcuts.get(way.layer) if cache else None
            )
            asked = [Prompt(tokens=tuple(prompt))]
            ((_, own),) = forced_logits(model, asked, [new], strategy)
            torch.testing.assert_close(logits, own, atol=2e-3, rtol=1e-3)
        given = logits.log_softmax(dim=-1)
        agrees = float((given.argmax(dim=-1) == full.argmax(dim=-1)).float().mean())
        kl = float((full.exp() * (full - given)).sum(dim=-1).mean())
        yield way, (agrees, kl, way.compute(n, len(kept)), way.cache(n, len(kept)))


def kept_by(model: sl.Model, way: Way, tokens: Tensor, resid: dict[int, Tensor]) -> list[int]:
    """Return the positions that go on, the start and the last among them but for ``shorter``."""
    n = len(tokens)
    size = round(way.size * n) if way.size < 1 else int(way.size)
    last = range(n - size, n)
    if way.kind == "shorter":
        return list(last)
    if way.keep == "last":
        return sorted({0, *last})
    half = set(range(n - size // 2, n))
    if way.keep == "sentences":
        ends = [i for i, t in enumerate(tokens.tolist()) if model.word(t).strip() in (".", ";")]
        return sorted({0, *ends[-size // 2 :], *half})
    mass = attention_mass(model, resid[way.layer - 1][:, :n], way.layer - 1)
    mass[[0, *half]] = torch.inf
    return sorted(mass.topk(size).indices.tolist())


def attention_mass(model: sl.Model, resid: Tensor, block: int) -> Tensor:
    """Return how much attention all later tokens pay to each, in the last block below an exit.

    The heavy hitters of H2O (Zhang et al. 2023, arXiv 2306.14048).
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layers, rotary = model.original.model.layers, model.original.model.rotary_emb
    attention, normed = layers[block].self_attn, layers[block].input_layernorm(resid)
    n, width = resid.shape[1], attention.head_dim
    queries, keys = (
        project(normed).view(1, n, -1, width).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *rotary(resid, torch.arange(n)[None]))
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries @ keys.mT * width**-0.5
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1).sum(dim=(0, 1, 2))


# -- time


def times(
    model: sl.Model, shortcuts: dict[int, Shortcuts], args: argparse.Namespace, n_tokens: int
) -> list[dict[str, Any]]:
    """Measure the CPU time to the first token, the full model's over each way's, in turns."""
    ids = wikitext(model, args.data)
    first = random.Random(0).randrange(len(ids) - n_tokens)
    prompt = Prompt(tokens=tuple(ids[first : first + n_tokens]))

    def run(strategy: ExitPrefill | None, prompt: Prompt = prompt) -> None:
        sl.generate(prompt, 1, model=model, stop=(), strategy=strategy)

    strategies: dict[Way, Callable[[], None]] = {}
    timed_here = [DROPPED[1], *(way for way in MAPPED if way.size == 8)]
    for way in wanted(args, timed_here):
        given = shortcuts[way.layer] if way.kind == "mapped" else None
        keep = sl.Keep(last=int(way.size))
        strategies[way] = partial(run, ExitPrefill(way.layer, keep, given))
    for way in wanted(args, SHORTER):
        strategies[way] = partial(
            run, None, Prompt(tokens=prompt.tokens[-round(way.size * n_tokens) :])
        )
    ratios: dict[Way, list[float]] = {way: [] for way in strategies}
    run(None)
    before = timed(partial(run, None))
    for _ in range(args.rounds):
        for way, turn in strategies.items():
            own, after = timed(turn), timed(partial(run, None))
            ratios[way].append((before.cpu + after.cpu) / 2 / own.cpu)
            before = after
    rows = []
    for way, logs in ((way, np.log(values)) for way, values in ratios.items()):
        ends = dict(zip(("prefill_low", "prefill_high"), np.exp(mean_interval(logs)), strict=True))
        kept = round(way.size * n_tokens) if way.size < 1 else int(way.size)
        size = {"compute": way.compute(n_tokens, kept), "cache": way.cache(n_tokens, kept)}
        row = described(way) | {"n": len(logs), "tokens": n_tokens} | size
        rows.append(row | {"prefill": float(np.exp(logs.mean()))} | ends)
    return rows


if __name__ == "__main__":
    main()
