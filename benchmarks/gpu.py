"""What the library does on a GPU: the same numbers as on the CPU, and how fast it is there.

Six parts, each kept in ``benchmarks/gpu.json`` with the card's name as soon as it is done:

- ``same``: every kind of run on the GPU beside the CPU, both in fp32: the largest difference.
- ``syncs``: how often a read of SPADE at twelve layers makes the host wait for the GPU.
- ``speed``: the embedded model in fp32 and bf16, beside plain Hugging Face.
- ``drafts``, ``large-drafts``: what a pass over 1 to 12 tokens costs, and the blocks below an exit;
  from both the acceptance at which drafts break even. Embedded model in bf16, and a 7B shape.
- ``large``: residuals, SPADE, exits, a patching sweep and peak memory on a Llama of the 7B shape
  with random weights, beside plain Hugging Face. In fp32: random weights of that size amplify the
  rounding of bf16 beyond what the check at load allows.

Times are medians of turns, base and subject one after the other. A few minutes in all.

    python benchmarks/gpu.py [--model NAME_OR_FILE] [--part speed ...] [--device cuda]
"""

import argparse
import copy
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from subjects import own_tree, random_prompt
from torch import Tensor

import spade_lens as sl
from spade_lens.exits import FixedLayer, SpadeExit
from spade_lens.generation import ExitPrefill, LayerExit, PromptLookup, Speculate, score_text
from spade_lens.lenses.lens import Reading
from spade_lens.models.cache import TokenCache
from spade_lens.models.clock import now, seconds_of

HERE = Path(__file__).parent
SEED = 0
PASSES = (1, 2, 3, 4, 6, 8, 12)
DRAFTS = (1, 2, 3, 4, 6, 8)
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 49152,  # the embedded model's, whose tokenizer is used
    "max_position_embeddings": 4096,
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or GGUF")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the 7B shape")
    parser.add_argument("--width", type=int, default=4096, help="its d_model, to try the script")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.loaded = sl.load(args.model)
    found |= {
        "card": torch.cuda.get_device_name() if cuda else "none: tried on a CPU",
        "torch": torch.__version__,
        "seed": SEED,
    }
    warnings.simplefilter("ignore")
    with sl.Settings(progress=False), torch.no_grad():
        for name in args.part or PARTS:
            since = time.perf_counter()
            try:
                rows = PARTS[name](args)
            except Exception:  # the other parts are still worth their time
                rows = [{"failed": traceback.format_exc()[-1500:]}]
            found[name] = rows
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"--- {name}: {time.perf_counter() - since:.0f} s", flush=True)
            for row in rows:
                print(row.get("failed") or row, flush=True)


def on_device(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> sl.Model:
    """A copy of the embedded model on the device: reading the file again would take longer."""
    copied = copy.deepcopy(args.loaded.original).to(args.device)
    for parameter in copied.parameters():  # the rotary tables stay in fp32, as when a file is read
        parameter.data = parameter.data.to(dtype)
    return sl.load(copied, tokenizer=args.loaded.tokenizer, name=args.loaded.name)


# -- the same numbers as on the CPU


def same(args: argparse.Namespace) -> list[Row]:
    """Every kind of run on both devices."""
    rows = []
    there, here = on_device(args), args.loaded
    for name, run in runs().items():
        try:
            with torch.enable_grad() if name == "fit, tuned" else torch.no_grad():
                on_gpu, on_cpu = run(there), run(here)
            off = (on_gpu.double().cpu() - on_cpu.double()).abs().max().item()
            rows.append({"run": name, "largest_difference": off, "of": on_cpu.abs().max().item()})
        except Exception:
            rows.append({"run": name, "failed": f"{name}: {traceback.format_exc()[-1200:]}"})
    return rows


def runs() -> dict[str, Callable[[sl.Model], Tensor]]:
    """What is compared, by name: each returns numbers."""
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
    ragged = [text, "Once upon a time", "def f(x):"]
    task = sl.task("animal/country")

    def words(model: sl.Model) -> list[sl.Prompt]:
        return sl.task("present-past").prompts(model.tokenizer, 8, shots=4, seed=SEED)

    def written(model: sl.Model, strategy: Any = None, **options: Any) -> Tensor:
        tokens = sl.generate(ragged, 24, model=model, strategy=strategy, stop=(), **options).tokens
        return torch.tensor([list(row) for row in tokens])

    def numbers(frame: Any) -> Tensor:
        return torch.tensor(frame.select_dtypes("number").to_numpy(float)).nan_to_num()

    def fitted(kind: str, model: sl.Model) -> Tensor:
        documents = [random_prompt(model, 64, seed) for seed in range(24)]
        lens = sl.fit(kind, model, documents, n_tokens=64, layers=[10, 20], per_piece="all")
        return torch.tensor(lens.held_out["kl_to_model"].to_numpy())

    def read(model: sl.Model, lens: Any, **options: Any) -> Tensor:
        found = sl.read(ragged, lens, model=model, layers=[5, 15, 25, 30], **options)
        return numbers(found.to_frame()[["entropy", "kl"]])

    patch = sl.Patch(12, positions="last", values=torch.ones(576), mode="add")
    return {
        "capture": lambda m: sl.capture(m, ragged[:1]).stack,
        "read, logit lens and SPADE": lambda m: read(m, ["logit", "spade"]),
        "read, kept tokens": lambda m: read(m, sl.Spade(m, keep=sl.Keep(last=4))),
        "grid": lambda m: read(m, "spade", positions="all"),
        "patch": lambda m: sl.patch(ragged, [patch], model=m).readout.entropy,
        "fit, L-SPADE": partial(fitted, "l-spade"),
        "fit, tuned": partial(fitted, "tuned"),
        "exit": lambda m: numbers(
            SpadeExit(m, None, FixedLayer(20), layers=[20]).run(words(m)).to_frame()
        ),
        "patching sweep": lambda m: numbers(
            sl.icl.patch_sweep(m, task.episodes(4, shots=4), layers=[10, 20]).summary()
        ),
        "contributions": lambda m: numbers(
            sl.icl.measure_contributions(m, task.episodes(2, shots=4), layers=[12])
        ),
        "greedy text": written,
        "sampled text": lambda m: written(
            m, sampling=sl.generation.Sampling(temperature=0.7, seed=SEED)
        ),
        "lookups": lambda m: written(m, Speculate()),
        "drafts of layer 20": lambda m: written(m, Speculate(LayerExit(20), 3, adaptive=False)),
        "exit and go on": lambda m: written(m, ExitPrefill(24, keep=sl.Keep(last=8))),
        "score": lambda m: numbers(score_text(text, " Madrid.", model=m, strategy=ExitPrefill(24))),
    }


# -- waits


def syncs(args: argparse.Namespace) -> list[Row]:
    """Count waits of the host in a read of SPADE at twelve layers."""
    model = on_device(args)
    prompt = random_prompt(model, 128)

    def run() -> None:
        sl.read(prompt, "spade", model=model, layers=range(6, 30, 2))

    run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        place = f"{Path(warning.filename).name}:{warning.lineno}"
        places[place] = places.get(place, 0) + 1
    most = sorted(places.items(), key=lambda item: -item[1])[:12]
    return [{"run": "SPADE at 12 layers", "syncs": len(caught), "most": dict(most)}]


# -- speed


def turns(base: Callable[[], Any], subjects: dict[str, Any], rounds: int, device: Any) -> list[Row]:
    """Base and subjects in turns: median milliseconds, and the median ratio to the base."""
    for run in (base, *subjects.values()):
        run()
    taken: dict[str, list[float]] = {"base": [], **{name: [] for name in subjects}}
    for _ in range(rounds):
        taken["base"].append(seconds_of(base, device))
        for name, run in subjects.items():
            taken[name].append(seconds_of(run, device))
    rows = []
    for name, seconds in taken.items():
        ratios = sorted(own / b for own, b in zip(seconds, taken["base"], strict=True))
        rows.append(
            {
                "run": name,
                "milliseconds": round(1000 * statistics.median(seconds), 3),
                "over_base": round(statistics.median(ratios), 4),
                "range": [round(ratios[0], 4), round(ratios[-1], 4)],
                "rounds": rounds,
            }
        )
    return rows


def speed(args: argparse.Namespace) -> list[Row]:
    """The embedded model in two precisions."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = on_device(args, dtype)
        known = {"model": model.name, "dtype": str(dtype).removeprefix("torch.")}
        rows += [known | row for row in of_a_prompt(model, args.rounds)]
        rows += [known | row for row in of_text(model, max(3, args.rounds // 3))]
    return rows


def of_a_prompt(model: sl.Model, rounds: int) -> list[Row]:
    """A prompt of 512 tokens: residuals, SPADE from all layers, the engine, a grid."""
    prompt = random_prompt(model, 512)
    tokens = torch.tensor([prompt.tokens], device=model.device)
    hf_model = own_tree(model.original)
    residuals = sl.capture(model, [prompt])
    lens, reading = sl.Spade(model), [Reading(0, 511, (0, 511))]
    layer = 2 * model.n_layers // 3
    engine = SpadeExit(model, None, FixedLayer(layer), layers=[layer])

    def spade() -> Tensor:
        finals = lens.final_residuals(residuals, reading, range(model.n_layers))
        return model.unembed(model.final_norm(finals[:, 0]))

    return turns(
        lambda: hf_model(tokens, use_cache=False, logits_to_keep=1),
        {
            "residuals of all layers": lambda: sl.capture(model, [prompt]),
            "SPADE from all layers, on top": spade,
            f"exit at {layer}": lambda: engine.run([prompt]),
            "read of SPADE at 12 layers": lambda: sl.read(
                prompt, lens, layers=range(0, model.n_layers, max(1, model.n_layers // 12))
            ),
        },
        rounds,
        model.device,
    )


def of_text(model: sl.Model, rounds: int) -> list[Row]:
    """32 new tokens after 200: Hugging Face's greedy text is the base."""
    prompt = random_prompt(model, 200)
    tokens = torch.tensor([prompt.tokens], device=model.device)
    hf_model = own_tree(model.original)
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)

    def ours(strategy: Any = None, n: int = 1) -> None:
        sl.generate([prompt] * n, 32, model=model, strategy=strategy, stop=())

    layer = model.n_layers // 4
    return turns(
        lambda: hf_model.generate(tokens, attention_mask=mask, **options),
        {
            "greedy": ours,
            "greedy, 16 rows": lambda: ours(n=16),
            "lookups": lambda: ours(Speculate()),
            "lookup of 3, 5 drafts": lambda: ours(Speculate(PromptLookup(3), 5, adaptive=False)),
            f"exit at {layer}, 3 drafts": lambda: ours(
                Speculate(LayerExit(layer), 3, adaptive=False)
            ),
        },
        rounds,
        model.device,
    )


# -- what drafts cost


def drafts(args: argparse.Namespace) -> list[Row]:
    """The cost model of drafts."""
    return of_drafts(on_device(args, torch.bfloat16), args.rounds)


def large_drafts(args: argparse.Namespace) -> list[Row]:
    """The same for the 7B shape."""
    return of_drafts(large_model(args), args.rounds)


def of_drafts(model: sl.Model, rounds: int) -> list[Row]:
    """What passes cost after 200 tokens, and the acceptance at which drafts break even."""
    n, device = 200, model.device
    cache = TokenCache(1, n + max(PASSES), device)
    tokens = torch.arange(n + max(PASSES), device=device)[None] + 100
    positions = torch.arange(n + max(PASSES), device=device)[None]
    decoder = model.structure.for_few_rows(packed=True) or model.structure
    at = positions[:, :n]
    decoder.run_blocks(decoder.embed(tokens[:, :n], at), at, 0, model.n_layers, cache=cache)
    cache.keep(at, [n])

    def run(m: int, layers: int) -> None:
        where = positions[:, n : n + m]
        resid = decoder.embed(tokens[:, n : n + m], where)
        resid = decoder.run_blocks(resid, where, 0, layers, cache=cache)
        decoder.unembed(decoder.final_norm(resid[0]))

    exits = [max(1, model.n_layers // k) for k in (8, 4, 2)]
    measured = turns(
        lambda: run(1, model.n_layers),
        {f"{m} tokens": partial(run, m, model.n_layers) for m in PASSES[1:]}
        | {f"1 token to layer {e}": partial(run, 1, e) for e in exits},
        3 * rounds,
        device,
    )
    cost = {row["run"]: row["over_base"] for row in measured}
    known = {"model": model.name, "dtype": str(model.dtype).removeprefix("torch.")}
    rows = [known | row for row in measured]
    for e in exits:
        for d in DRAFTS:
            passes = {1: 1.0} | {m: cost[f"{m} tokens"] for m in PASSES[1:]}
            verify = passes[min(m for m in PASSES if m >= d + 1)]
            spent = d * cost[f"1 token to layer {e}"] + verify
            rows.append(
                known
                | {
                    "exit": e,
                    "drafts": d,
                    "round_in_steps": round(spent, 3),
                    "break_even_acceptance": break_even(d, spent),
                }
            )
    return rows


def break_even(drafts: int, steps: float) -> float | None:
    """The acceptance of every draft at which a round of so many steps pays; None if none does."""
    low, high = 0.0, 1.0
    if steps > drafts + 1:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        new = sum(middle**k for k in range(drafts + 1))
        low, high = (low, middle) if new >= steps else (middle, high)
    return round(high, 3)


# -- a large model


def large_model(args: argparse.Namespace) -> sl.Model:
    """A Llama of the 7B shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LARGE["hidden_size"] // args.width
    shape = {k: v // small if "size" in k and "vocab" not in k else v for k, v in LARGE.items()}
    config = LlamaConfig(**shape | {"num_hidden_layers": args.layers})
    torch.manual_seed(SEED)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).eval()
    name = "a random Llama of the 7B shape"
    return sl.load(model, tokenizer=args.loaded.tokenizer, name=name)


def large(args: argparse.Namespace) -> list[Row]:
    """The 7B shape: speed, a patching sweep, peak memory."""
    model = large_model(args)
    known = {"model": model.name, "dtype": "float32"}
    rows = [known | row for row in of_a_prompt(model, args.rounds)]
    rows += [known | row for row in of_text(model, 3)]
    episodes = sl.task("animal/country").episodes(16, shots=8)
    layers = range(0, model.n_layers, max(1, model.n_layers // 8))
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    since = now(model.device)
    sl.icl.patch_sweep(model, episodes, layers=layers)
    seconds = now(model.device) - since
    peak = torch.cuda.max_memory_allocated() - held if cuda else 0
    return [
        *rows,
        known
        | {
            "run": f"patching sweep, 16 episodes of 8, {len(layers)} layers",
            "milliseconds": round(1000 * seconds, 1),
            "peak_gib_beside_weights": round(peak / 2**30, 3),
        },
    ]


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "same": same,
    "syncs": syncs,
    "speed": speed,
    "drafts": drafts,
    "large-drafts": large_drafts,
    "large": large,
}

if __name__ == "__main__":
    main()
