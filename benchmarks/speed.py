"""How fast spade_lens is beside plain Hugging Face and its peers: ratios, with their spread.

On SmolLM2-135M-Instruct in fp32 with two threads. Prints a table and merges its records into
``benchmarks/results.json``. Under transformer-lens 4 it measures all but HookedTransformer, under
transformer-lens 3.9 that alone; the two cannot share an environment.

    python benchmarks/speed.py [--quick] [--rounds N]
"""

import argparse
import itertools
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Threads that spin while they wait for one another make small operations up to ten times slower as
# soon as somebody else computes too. Read when torch is imported, hence up here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import records
import subjects
import torch
from records import Record, absent, of_ratio
from timing import interleave, interleave_at_seams
from torch import Tensor

import spade_lens as sl
from spade_lens import Settings
from spade_lens.lenses.lens import Reading

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a whole prompt")
    parser.add_argument(
        "--threads", type=int, default=2, help="1 gives steadier ratios on a crowded machine"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or GGUF")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--only", choices=sorted(FIGURES), action="append", help="repeatable")
    args = parser.parse_args()
    rounds = 5 if args.quick else args.rounds

    torch.set_num_threads(args.threads)
    _quiet()
    model = sl.load(args.model)
    found: list[Record] = []
    with torch.no_grad():
        hooked = subjects.make_hooked(model.original)
        chosen = args.only or (["hooked"] if hooked is not None else list(FIGURES))
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            begin = time.monotonic()
            found += FIGURES[name](model, hooked if name == "hooked" else args.model, rounds)
            print(f"  {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    run = records.circumstances(seed=subjects.SEED, threads=args.threads, model=model.name)
    records.merge(args.out, found, run)
    print(records.table(found))
    print(f"\nMedians of ratios of neighbours in one process (wall time); written to {args.out}")


def prompt_512(model: sl.Model, _: Any, rounds: int) -> list[Record]:
    """All residuals of a long prompt, and SPADE from all layers on top of them."""
    n = 512
    prompt = subjects.random_prompt(model, n)
    tokens = torch.tensor([prompt.tokens])
    hf_model = subjects.own_tree(model.original)

    captures: dict[str, subjects.Residuals] = {
        "spade_lens": subjects.ours_residuals(model, prompt),
        "HF output_hidden_states": subjects.hugging_face_residuals(hf_model, tokens),
        "TransformerBridge": subjects.bridge_residuals(subjects.make_bridge(model), tokens),
    }
    if subjects.has("nnsight"):
        captures["nnsight"] = subjects.nnsight_residuals(hf_model, tokens)
    _agree({name: lambda c=c: torch.stack(c()[:-1]) for name, c in captures.items()})

    residuals = sl.capture(model, [prompt], settings=Settings(progress=False))
    lens, reading = sl.Spade(model), [Reading(0, n - 1, (0, n - 1))]

    def spade() -> Tensor:
        finals = lens.final_residuals(residuals, reading, range(model.n_layers))
        return model.unembed(model.final_norm(finals[:, 0]))

    def no_unembedding() -> Any:
        return hf_model.model(tokens, use_cache=False)

    measured = interleave(
        lambda: hf_model(tokens, use_cache=False),
        {**captures, "no unembedding": no_unembedding, "spade": spade},
        rounds=rounds,
        seconds=20 * rounds,
    )
    base = f"HF forward, {n} tokens"
    found = [
        of_ratio(
            f"residuals of {n} tokens: {name}",
            measured[name],
            base=base,
            target=1.05 if name == "spade_lens" else None,
            note="stops before the unembedding" if name == "spade_lens" else "",
        )
        for name in captures
    ]
    if "nnsight" not in captures:
        found.append(absent(f"residuals of {n} tokens: nnsight", "not installed"))
    found.append(
        of_ratio(
            f"residuals of {n} tokens: none (HF without the unembedding)",
            measured["no unembedding"],
            base=base,
        )
    )
    found.append(
        of_ratio(
            f"SPADE from all {model.n_layers} layers: spade_lens",
            measured["spade"],
            base=base,
            target=0.10,
            note="on top of the capture, logits included",
        )
    )
    return found


def two_tokens(model: sl.Model, _: Any, rounds: int) -> list[Record]:
    """Two distant tokens through the last ten blocks."""
    start, stop = model.n_layers - 10, model.n_layers
    resid = sl.capture(
        model,
        [subjects.random_prompt(model, 512)],
        layers=[start],
        positions=[[0, 500]],
        settings=Settings(progress=False),
    ).stack
    by_hand, prepared = subjects.blocks_by_hand(
        subjects.own_tree(model.original), resid, start, stop
    )
    # Positions change from call to call, so that nothing kept of the last call helps.
    at = {name: _alternating() for name in ("ours", "by hand", "prepared", "bridge")}
    bridge = subjects.make_bridge(model)

    def ours() -> Tensor:
        return model.run_blocks(resid, next(at["ours"]), start, stop)

    def on_bridge() -> Tensor:
        positions = next(at["bridge"])
        return bridge(
            resid,
            start_at_layer=start,
            stop_at_layer=stop,
            position_ids=positions,
            use_cache=False,
            attention_mask=torch.zeros(1, 1, 2, 2).triu(1),
        )

    same = torch.tensor([[0, 500]])
    _agree(
        {
            "ours": lambda: model.run_blocks(resid, same, start, stop),
            "by hand": lambda: by_hand(same),
            "prepared": lambda: prepared(same),
        }
    )
    first = interleave(
        lambda: by_hand(next(at["by hand"])),
        {"ours": ours, "bridge": on_bridge},
        rounds=40 * rounds,
        seconds=3 * rounds,
    )
    second = interleave(
        lambda: prepared(next(at["prepared"])),
        {"ours": ours},
        rounds=40 * rounds,
        seconds=2 * rounds,
    )
    name, base = "2 tokens, last 10 blocks", "the HF blocks by hand"
    made_inside = f"{base}, mask and rotary tables made in the call"
    return [
        of_ratio(f"{name}: spade_lens", first["ours"], base=made_inside, target=1.10),
        of_ratio(
            f"{name}: spade_lens, beside prepared HF",
            second["ours"],
            base=f"{base}, mask and rotary tables made beforehand",
        ),
        of_ratio(
            f"{name}: TransformerBridge",
            first["bridge"],
            base=made_inside,
            note="start_at_layer runs the other 20 blocks too",
        ),
    ]


def look(model: sl.Model, _: Any, rounds: int) -> list[Record]:
    """What it costs to see, at the beginning of every call, whether the model has changed."""
    positions = torch.tensor([[0, 500]])
    resid = model.embed(torch.tensor([[1, 5]]), positions)
    found = interleave(
        lambda: model.run_blocks(resid, positions, 0, model.n_layers),
        {"look": lambda: model.n_layers},
        rounds=20 * rounds,
        seconds=3 * rounds,
    )
    return [
        of_ratio(
            "the look at the model when a call begins",
            found["look"],
            base="2 tokens, all blocks",
            target=0.02,
        )
    ]


def grid(model: sl.Model, source: str, rounds: int) -> list[Record]:
    """Every position times every layer of a text."""
    n = 256
    prompt = subjects.random_prompt(model, n)
    tokens = torch.tensor([prompt.tokens])
    hf_model = subjects.own_tree(model.original)
    lens = sl.Spade(model)
    measured = interleave_at_seams(
        lambda: hf_model(tokens, use_cache=False),
        lambda: sl.read(prompt, lens, positions="all", top_k=1, settings=Settings(progress=False)),
        [(model, "run_blocks"), (model, "unembed")],
        turns=20,
        rounds=max(1, rounds // 3),
    )
    name = f"grid, {n} tokens x {model.n_layers} layers"
    return [
        of_ratio(f"{name}: spade_lens", measured, base=f"HF forward, {n} tokens", target=22),
        _grid_memory(f"{name}, peak extra memory: spade_lens", source, n),
    ]


def _grid_memory(name: str, source: str, n_tokens: int) -> Record:
    if not Path("/proc/self/clear_refs").exists():
        return absent(name, "measured on Linux only")
    command = [sys.executable, str(HERE / "memory.py"), source, str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    value = int(done.stdout.split()[-1]) / 1e9
    return Record(name, value, rounds=1, target=1.0, met=value <= 1.0, unit="GB")


def hooked_transformer(model: sl.Model, hooked: Any, rounds: int) -> list[Record]:
    """Two tokens through all blocks of a ``HookedTransformer``, by itself and wrapped by us."""
    name = f"2 tokens, all {model.n_layers} blocks of a HookedTransformer 3.9"
    names = [f"{name}: wrapped, beside itself", f"{name}: wrapped", f"{name}: itself"]
    if hooked is None or isinstance(hooked, str):
        return [absent(name, "needs transformer-lens 3.9") for name in names]
    before = {k: (v.data_ptr(), v.stride(), v._version) for k, v in hooked.state_dict().items()}
    wrapped = sl.load(hooked, tokenizer=model.tokenizer)
    positions = torch.tensor([[0, 1]])
    resid = model.embed(torch.tensor([[model.tokenizer.bos_token_id, 500]]), positions)
    by_hand, _ = subjects.blocks_by_hand(
        subjects.own_tree(model.original), resid, 0, model.n_layers
    )

    def itself() -> Tensor:
        h = resid
        for block in hooked.blocks:
            h = block(h)
        return h

    def ours() -> Tensor:
        return wrapped.run_blocks(resid, positions, 0, model.n_layers)

    identical = torch.equal(itself(), ours())
    after = {k: (v.data_ptr(), v.stride(), v._version) for k, v in hooked.state_dict().items()}
    note = ("bit-identical" if identical else "NOT bit-identical") + (
        ", the user's model untouched" if before == after else ", the user's model CHANGED"
    )
    _agree({"by hand": lambda: by_hand(positions), "ours": ours})
    beside_itself = interleave(itself, {"ours": ours}, rounds=10 * rounds, seconds=5 * rounds)
    beside_hf = interleave(
        lambda: by_hand(positions),
        {"ours": ours, "itself": itself},
        rounds=10 * rounds,
        seconds=5 * rounds,
    )
    hf_blocks = "the HF blocks by hand"
    return [
        of_ratio(
            names[0],
            beside_itself["ours"],
            base="the user's HookedTransformer",
            note=note,
        ),
        of_ratio(names[1], beside_hf["ours"], base=hf_blocks),
        of_ratio(names[2], beside_hf["itself"], base=hf_blocks),
    ]


Figure = Callable[[sl.Model, Any, int], list[Record]]

FIGURES: dict[str, Figure] = {
    "prompt": prompt_512,
    "two-tokens": two_tokens,
    "look": look,
    "grid": grid,
    "hooked": hooked_transformer,
}


def _alternating() -> Iterator[Tensor]:
    return itertools.cycle([torch.tensor([[0, 500]]), torch.tensor([[0, 499]])])


def _agree(runs: Mapping[str, Callable[[], Tensor]]) -> None:
    """Subjects are comparable only if they compute the same."""
    values = {name: run() for name, run in runs.items()}
    first = next(iter(values.values()))
    for name, value in values.items():
        error = ((value - first).norm() / first.norm()).item()
        if not error < 1e-4:
            raise RuntimeError(f"{name} does not compute what the others do (off by {error:.2g}).")


def _quiet() -> None:
    # Loading bars and advice of the peers would break up the table.
    warnings.simplefilter("ignore")
    for name in ("transformers", "transformer_lens", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
