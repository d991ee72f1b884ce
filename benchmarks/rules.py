"""How fast a patching sweep is beside the same sweep by hooks on whole forwards.

On SmolLM2-135M-Instruct in fp32: all layers x 8 conditions over 64 prompts of 16 demonstrations.
Ours is run whole, captures included, and interrupted every few batches, where TransformerLens'
``TransformerBridge.run_with_hooks`` gets a turn: one *cell* of the same sweep, which is a
condition, a layer and a batch of 16 prompts. All its cells would take hours; those that are run
are drawn at random, with a fixed seed, and the whole is their number times the mean. The bridge
gets the vectors to write for nothing. Both must give the same logit differences to 1e-4.

    python benchmarks/rules.py [--quick] [--rounds N]
"""

import argparse
import itertools
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# As in speed.py: threads that spin while they wait slow down everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import records
import subjects
import torch
from timing import Ratio, interleave_at_seams
from torch import Tensor

import spade_lens as sl
from spade_lens import Settings, icl, tasks, tensors

HERE = Path(__file__).parent
TASK = "animal/country"
# Local and global patching, each with its three controls.
CONDITIONS = (
    icl.Condition("labels to the top", window=None),
    icl.Condition("labels to the top, random", source="random", window=None),
    icl.Condition("labels to the top, shuffled", source="shuffled", window=None),
    icl.Condition("labels to the top, opposite", source="opposite", window=None),
    icl.Condition("final position", site="final"),
    icl.Condition("final position, random", site="final", source="random"),
    icl.Condition("final position, shuffled", site="final", source="shuffled"),
    icl.Condition("final position, opposite", site="final", source="opposite"),
)
AT_ONCE = 16
"""Prompts of a cell: logits of all their tokens are a quarter of a GB."""

Cell = tuple[icl.Condition, int, range]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often our sweep is run")
    parser.add_argument("--cells", type=int, default=48, help="of the peer, drawn at random")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or GGUF")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="16 prompts and few layers, to see that it runs; writes nothing",
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.cells = 1, 6
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    for name in ("transformers", "transformer_lens", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    model = sl.load(args.model)
    episodes = tasks.task(TASK).episodes(16 if args.quick else 64, shots=16, seed=subjects.SEED)
    layers = list(range(0, model.n_layers + 1, 10 if args.quick else 1))
    with torch.no_grad():
        measured, note = sweep(model, episodes, layers, n_cells=args.cells, rounds=args.rounds)
    found = records.of_ratio(
        f"patching, {len(layers)} layers x {len(CONDITIONS)} conditions, {len(episodes)} prompts "
        "of 16 demonstrations: spade_lens",
        measured,
        base="the same by TransformerBridge.run_with_hooks on whole forwards",
        target=0.2,
        note=note,
    )
    print(records.table([found]))
    if args.quick:
        print("\nNothing was written: this was a look at whether it runs.")
        return
    run = records.circumstances(seed=subjects.SEED, threads=args.threads, model=model.name)
    records.merge(args.out, [found], run)
    print(f"\nWall time of one process, taking turns; written to {args.out}")


def sweep(
    model: sl.Model,
    episodes: Sequence[tasks.Episode],
    layers: Sequence[int],
    *,
    n_cells: int,
    rounds: int,
) -> tuple[Ratio, str]:
    batches = [range(i, i + AT_ONCE) for i in range(0, len(episodes), AT_ONCE)]
    every: list[Cell] = list(itertools.product(CONDITIONS, layers, batches))
    cells = random.Random(subjects.SEED).sample(every, n_cells)
    peer = Peer(model, episodes)
    turn = itertools.cycle([lambda cell=cell: peer.run(cell) for cell in cells])
    last: list[pd.DataFrame] = []

    def ours() -> None:
        last[:] = [
            icl.patch_sweep(
                model,
                episodes,
                conditions=CONDITIONS,
                layers=layers,
                setup=icl.PromptSetup(seed=subjects.SEED),
                settings=Settings(progress=False),
            ).to_frame()
        ]

    print("Against the clock ...", file=sys.stderr, flush=True)
    one = interleave_at_seams(
        lambda: next(turn)(), ours, [(model, "run_blocks")], turns=n_cells, rounds=rounds
    )
    print("The same numbers? ...", file=sys.stderr, flush=True)
    off = disagreement(last[0], cells, peer)
    share = 1 / len(every)
    whole = replace(
        one,
        ratio=one.ratio * share,
        low=one.low * share,
        high=one.high * share,
        cpu_ratio=one.cpu_ratio * share,
        base_seconds=one.base_seconds * len(every),
    )
    return whole, (
        f"{1 / whole.ratio:.1f} times as fast; ours whole, the base extrapolated from {n_cells} of "
        f"its {len(every)} cells of {AT_ONCE} prompts, drawn at random; logit differences differ "
        f"by {off:.1g} at most; local conditions write all labels from the patched layer up, "
        "global ones the final position, so more is known beforehand than in other sweeps"
    )


class Peer:
    """The same sweep, cell by cell, as one would write it with TransformerLens alone."""

    def __init__(self, model: sl.Model, episodes: Sequence[tasks.Episode]) -> None:
        self.bridge, self.n_layers = subjects.make_bridge(model), model.n_layers
        self.base = [e.dummy().prompt(model.tokenizer) for e in episodes]
        relatives = {
            "own": list(episodes),
            "shuffled": [e.shuffled(subjects.SEED + i) for i, e in enumerate(episodes)],
            "opposite": [e.opposite() for e in episodes],
        }
        prompts = {k: [e.prompt(model.tokenizer) for e in some] for k, some in relatives.items()}
        quiet = Settings(progress=False)
        self.vectors = {
            (k, site): vectors
            for k, p in prompts.items()
            for site, vectors in (
                ("labels", icl.rule_vectors(model, p, settings=quiet).tensor),
                ("final", icl.final_position_vectors(model, p, settings=quiet)),
            )
        }

    def run(self, cell: Cell) -> Tensor:
        """Logit differences of one condition, at one layer, of a batch of prompts."""
        condition, layer, some = cell
        prompts = [self.base[i] for i in some]
        length = max(map(len, prompts))
        # Causal attention never looks at what is put after a prompt's end.
        tokens = torch.tensor([[*p.tokens, *[p.tokens[-1]] * (length - len(p))] for p in prompts])
        hooks = [
            (self._point(at), self._write(condition, at, some))
            for at in condition.written(layer, self.n_layers)
        ]
        logits = self.bridge.run_with_hooks(
            tokens, fwd_hooks=hooks, return_type="logits", use_cache=False
        )
        found = []
        for row, prompt in zip(logits, prompts, strict=True):
            (wrong,) = (token for token in prompt.candidates if token != prompt.target)
            found.append(row[prompt.answer, prompt.target] - row[prompt.answer, wrong])
        return torch.stack(found)

    def _point(self, layer: int) -> str:
        return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"

    def _write(
        self, condition: icl.Condition, layer: int, some: range
    ) -> Callable[[Tensor, Any], Tensor]:
        values = self._values(condition, layer)[some.start : some.stop]
        spans = [self.base[i].spans["labels"] for i in some]
        if condition.site == "final":
            at = torch.tensor([[self.base[i].answer] for i in some])
        else:
            demos = condition.demonstrations(len(spans[0]))
            at = torch.tensor([[span[demo] for demo in demos] for span in spans])
            values = values[:, list(demos)]
        rows = torch.arange(len(some))[:, None]

        def write(resid: Tensor, hook: Any) -> Tensor:
            resid[rows, at] = values
            return resid

        return write

    def _values(self, condition: icl.Condition, layer: int) -> Tensor:
        """What is written at a layer [batch place d_model]."""
        source = "own" if condition.source == "random" else condition.source
        found = self.vectors[source, condition.site][layer]
        if condition.source == "random":
            found = tensors.random_like(found, seed=subjects.SEED * 1000 + layer)
        return found if condition.site == "labels" else found[:, None]


def disagreement(frame: pd.DataFrame, cells: Sequence[Cell], peer: Peer) -> float:
    """The largest difference of logit differences; an error where it is above 1e-4."""
    known = frame.set_index(["condition", "layer", "prompt"])["logit_diff"]
    most = 0.0
    for condition, layer, some in cells:
        ours = torch.tensor([known[condition.name, layer, i] for i in some])
        off = float((ours - peer.run((condition, layer, some))).abs().max())
        if not off < 1e-4:
            raise RuntimeError(
                f"Condition {condition.name!r} at layer {layer}: logit differences are off by "
                f"{off:.2g} from those of run_with_hooks."
            )
        most = max(most, off)
    return most


if __name__ == "__main__":
    main()
