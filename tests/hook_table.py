"""The table of hooks on ``docs/hooks.md``: measured on tiny models, and compared by a test.

python tests/hook_table.py  # from the project's root: writes the table anew
"""

import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tiny import D_VOCAB, tiny

import spade_lens as sl

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"
BEGIN, END = "<!-- table of hooks -->", "<!-- end -->"
FAMILIES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gpt-neox": "NeoX",
    "gpt2": "GPT2",
    "opt": "OPT",
}
_SIZES = {
    3: "row",
    5: "pos",
    32: "d_model",
    4: "head",
    2: "kv_head",
    8: "d_head",
    48: "d_mlp",
    128: "d_mlp",
    D_VOCAB: "d_vocab",
    1: "1",
    15: "(row pos)",
}

Firing = tuple[str, str, str]
"""A hook name with ``{b}`` for the block, the operation (and whether it acts), and the shape."""


def pattern(name: str) -> str:
    """A hook name with ``{b}`` for its block."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{b}.", name)


def by_position(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    """Add something that depends on every place in a row, and on no other row."""
    one_row = activation[0]
    places = torch.arange(one_row.numel()).reshape(one_row.shape)
    if not activation.is_floating_point():
        return (activation + places) % 90
    return activation + (0.2 * torch.sin(1 + places)).to(activation.dtype)


def names_to_try(model: sl.Model) -> list[str]:
    """The names of all hook points outside blocks and in one block."""
    points = dict.fromkeys(model.hook_names.values())
    return [name for name in points if not name.startswith("blocks.") or ".2." in name]


def _idle(model: sl.Model) -> set[str]:
    """The names, with ``{b}``, at which nothing that a hook gives has an effect."""
    tokens = torch.arange(15).reshape(3, 5)
    at = torch.arange(5).expand_as(tokens)

    def logits() -> torch.Tensor:
        return model.logits(model.run_blocks(model.embed(tokens), at, 0, model.n_layers)[:, -1])

    plain, idle = logits(), set()
    for name in names_to_try(model):
        try:
            with warnings.catch_warnings(), model.hooks([(name, by_position)]):
                warnings.simplefilter("ignore")  # that a norm is computed another way when edited
                acts = not torch.allclose(logits(), plain, atol=1e-5)
        except sl.UnsupportedModelError:
            idle.add(pattern(name))
        else:
            assert acts, f"what a hook gives at {name} is taken and has no effect"
    return idle


def firings(model: sl.Model) -> dict[Firing, set[str]]:
    """What fires when all five operations run once, and under which other names it is known."""
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    def note(activation: torch.Tensor, hook: Any) -> None:
        run = model.running
        operation = "embed" if run.stop == 0 else "blocks"
        if run.positions is None:
            operation = "unembed" if hook.name.startswith("unembed") else "final norm"
        seen.append((hook.name, operation, tuple(activation.shape)))

    with model.hooks([(lambda name: True, note)]):
        tokens = torch.arange(15).reshape(3, 5)
        positions = torch.arange(5).expand_as(tokens)
        resid = model.run_blocks(model.embed(tokens), positions, 0, model.n_layers)
        model.unembed(model.final_norm(resid[:, -1]))
    assert len({(name, shape) for name, _, shape in seen}) == len(seen), "something fires twice"
    found: dict[Firing, set[str]] = defaultdict(set)
    idle = _idle(model)
    for name, operation, sizes in seen:
        read_only = ", read only" if pattern(name) in idle else ""
        found[pattern(name), operation + read_only, _shape(name, sizes)]
    canonical = {name: key for key in found for name in [key[0]]}
    for name, point in model.hook_names.items():
        if pattern(name) != pattern(point):
            found[canonical[pattern(point)]].add(pattern(name))
    return dict(found)


def _shape(name: str, sizes: tuple[int, ...]) -> str:
    if name.endswith(("hook_cos", "hook_sin")):
        return "[row pos d_rotary]"
    words = [_SIZES[size] for size in sizes]
    if sizes[1:] == (4, 5, 5):
        words[2:] = ["query", "key"]
    return f"[{' '.join(words)}]"


def table(by_family: dict[str, dict[Firing, set[str]]]) -> str:
    """The table in Markdown, one line for every firing."""
    families: dict[Firing, list[str]] = defaultdict(list)
    also: dict[Firing, set[str]] = defaultdict(set)
    for key, title in FAMILIES.items():
        for firing, aliases in by_family[key].items():
            families[firing].append(title)
            also[firing] |= aliases
    lines = ["| name | also called | fires in | shape | families |", "|---|---|---|---|---|"]
    order = ["embed", "blocks", "final norm", "unembed"]
    for firing in sorted(families, key=lambda f: (order.index(f[1].split(",")[0]), f)):
        names = ", ".join(
            f"`{alias.removeprefix('blocks.{b}.')}`" for alias in sorted(also[firing])
        )
        of = "all six" if len(families[firing]) == 6 else ", ".join(families[firing])
        name, operation, shape = firing
        lines.append(f"| `{name}` | {names} | {operation} | `{shape}` | {of} |")
    return "\n".join(lines)


def page_table() -> str:
    """The table as it is on the page."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    measured = {key: firings(sl.load(tiny(key), name=key)) for key in FAMILIES}
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(measured)}\n\n{END}{after}", encoding="utf-8")
