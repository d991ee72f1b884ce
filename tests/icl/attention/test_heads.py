"""Heads and function vectors: exact against Hugging Face's own modules with plain hooks."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from figures import assert_readable, legend
from reference import blocks_of, hidden_states
from tiny import ARCHITECTURES, tiny
from torch import Tensor

from spade_lens import (
    Model,
    Patch,
    Prompt,
    Settings,
    UnsupportedModelError,
    capture,
    icl,
    load,
    plots,
    stats,
    tasks,
    tensors,
)
from spade_lens.icl.attention.heads import block_with, head_contributions, head_outputs
from spade_lens.icl.patching.function_vectors import function_vectors
from spade_lens.lenses.answers import read_answers
from spade_lens.prompts import Template

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
TASK = tasks.RuleTask("t", {"x": ("a", "bb", "ccc", "d", "ee"), "y": ("ff", "g", "hhh", "i", "jj")})
EPISODES = TASK.episodes(8, shots=4)
RULES = [episode.rule for episode in EPISODES]
ANSWERS = [episode.answer for episode in EPISODES]
HOW: dict[str, Any] = {"setup": icl.PromptSetup(TIGHT)}
WITH_Z = icl.PromptSetup(TIGHT, ("z",))
PROMPTS = [
    Prompt(tokens=(1, *(5 + 3 * i for i in range(12))), answer=9),
    Prompt(tokens=(1, *(8 + 2 * i for i in range(6)))),
]
NORMED = ("gemma2", "gemma3")


def projection(block: Any) -> Any:
    """The module that the heads' outputs go into."""
    attention = next(
        getattr(block, name)
        for name in ("self_attn", "attn", "attention")
        if getattr(block, name, None) is not None
    )
    return next(
        getattr(attention, name)
        for name in ("o_proj", "out_proj", "c_proj", "dense")
        if getattr(attention, name, None) is not None
    )


@contextmanager
def before_projection(hf_model: Any, block: int, change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    handle = projection(blocks_of(hf_model)[block]).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_hand(hf_model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Inputs of the projections at the answer positions, one prompt at a time."""
    out = torch.empty(4, len(prompts), 32)
    for i, prompt in enumerate(prompts):
        for b in range(4):

            def look(x: Tensor, b: int = b, i: int = i, at: int = prompt.answer) -> Tensor:
                out[b, i] = x.reshape(1, -1, 32)[0, at]
                return x

            with before_projection(hf_model, b, look):
                hf_model(torch.tensor([prompt.tokens]), use_cache=False)
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_contributions_are_those_of_the_modules(name: str) -> None:
    hf_model = tiny(name)
    model = load(hf_model)
    outputs = head_outputs(model, PROMPTS)
    torch.testing.assert_close(outputs.flatten(2), by_hand(hf_model, PROMPTS), atol=1e-5, rtol=1e-4)
    # Heads that are given their own outputs change nothing.
    for i, prompt in enumerate(PROMPTS):
        stream = hidden_states(hf_model, prompt.tokens)
        for b in range(4):
            after, _ = block_with(model, b, stream[b][None, prompt.answer], outputs[b, i : i + 1])
            torch.testing.assert_close(after[0], stream[b + 1][prompt.answer], atol=1e-5, rtol=1e-4)
    if name in NORMED:
        with pytest.raises(UnsupportedModelError, match="a norm comes between"):
            head_contributions(model, outputs)
        return
    added = head_contributions(model, outputs[1:3], blocks=[1, 2])
    for n, b in enumerate((1, 2)):
        module = projection(blocks_of(hf_model)[b])
        with torch.no_grad():
            whole, bias = module(outputs[b].flatten(1)), module(torch.zeros(1, 32))
        torch.testing.assert_close(added[n].sum(dim=1) + bias, whole, atol=1e-5, rtol=1e-4)
        alone = torch.zeros(2, 4, 8)
        alone[:, 2] = outputs[b, :, 2]
        with torch.no_grad():
            expected = module(alone.flatten(1)) - bias
        torch.testing.assert_close(added[n][:, 2], expected, atol=1e-5, rtol=1e-4)


def test_batches_and_blocks_change_nothing(tiny_llama: Model, monkeypatch: Any) -> None:
    whole = head_outputs(tiny_llama, PROMPTS * 3)
    monkeypatch.setattr("spade_lens.settings._BATCH_TOKENS", 11)
    some = head_outputs(tiny_llama, PROMPTS * 3, blocks=[3, 1])
    torch.testing.assert_close(some, whole[[3, 1]])
    few = head_contributions(tiny_llama, whole)[[3, 1]]
    with Settings(batch_size=5):
        torch.testing.assert_close(head_contributions(tiny_llama, some, blocks=[3, 1]), few)
        torch.testing.assert_close(head_outputs(tiny_llama, PROMPTS * 3), whole)


def test_above_a_head_the_answer_alone_runs(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run_blocks = Model.run_blocks

    def counted(self: Model, resid: Tensor, positions: Tensor, start: int, *args: Any, **how: Any):
        ran.append(resid.shape[1] if start > 0 else 0)  # at 0 whole prompts are captured
        return run_blocks(self, resid, positions, start, *args, **how)

    monkeypatch.setattr(Model, "run_blocks", counted)
    icl.head_effects(tiny_llama, EPISODES, n=2, blocks=[0], **HOW)
    icl.function_vector_sweep(tiny_llama, EPISODES, [(0, 1)], layers=[2], **HOW)
    assert max(ran) == 1


@pytest.mark.parametrize(("measure", "size"), [("logit_diff", 0.1), ("probability", 1e-3)])
def test_effects_equal_whole_forwards_with_a_head_replaced(
    tiny_llama: Model, measure: Any, size: float
) -> None:
    hf_model = tiny()
    shown = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in EPISODES]
    base = [
        e.shuffled(5 + i).prompt(tiny_llama.tokenizer, template=TIGHT)
        for i, e in enumerate(EPISODES[:2])
    ]
    outputs = by_hand(hf_model, shown)
    seeded = icl.PromptSetup(TIGHT, seed=5)
    frame = icl.head_effects(tiny_llama, EPISODES, n=2, measure=measure, setup=seeded)
    assert len(frame) == 4 * 4 * 2 and (frame["task"] == "t").all()

    @torch.no_grad()
    def value(prompt: Prompt) -> float:
        logits = hf_model(torch.tensor([prompt.tokens]), use_cache=False).logits[0, prompt.answer]
        if measure == "probability":
            return float(logits.softmax(dim=-1)[prompt.target])
        (wrong,) = (token for token in prompt.candidates if token != prompt.target)
        return float(logits[prompt.target] - logits[wrong])

    for row in frame.itertuples():
        prompt, mine = base[row.prompt], slice(8 * row.head, 8 * row.head + 8)
        others = [
            j for j, rule in enumerate(RULES) if rule == RULES[row.prompt] and j != row.prompt
        ]
        by_answer = [[j for j in others if ANSWERS[j] == answer] for answer in "AB"]
        mean = sum(outputs[row.block, some].mean(dim=0) for some in by_answer) / 2

        def change(x: Tensor, mine: slice = mine, mean: Tensor = mean) -> Tensor:
            x = x.clone()
            x[0, -1, mine] = mean[mine]
            return x

        before = value(prompt)
        with before_projection(hf_model, row.block, change):
            assert row.effect == pytest.approx(value(prompt) - before, abs=size / 500)
    assert frame["effect"].abs().max() > size
    part = icl.head_effects(tiny_llama, EPISODES, n=2, measure=measure, setup=seeded, blocks=[3])
    same = frame[frame["block"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, same, rtol=1e-3, atol=size / 500)


def test_the_best_heads() -> None:
    rows = {"block": [0, 1, 0, 1], "head": [0, 1, 0, 1], "effect": [3.0, 1.0, -2.0, 0.5]}
    assert icl.top_heads(pd.DataFrame(rows), 2) == [(1, 1), (0, 0)]
    with pytest.raises(ValueError, match="n=3 was given; expected 1 to 2"):
        icl.top_heads(pd.DataFrame(rows), 3)
    with pytest.raises(ValueError, match=r"lacks \['effect'\]"):
        icl.top_heads(pd.DataFrame({"block": [1], "head": [1]}))


def test_function_vectors_are_sums_of_means_of_others(tiny_llama: Model) -> None:
    hf_model = tiny()
    prompts = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in EPISODES]
    outputs = head_outputs(tiny_llama, prompts)
    heads = [(3, 1), (1, 0), (1, 2)]
    own = function_vectors(tiny_llama, outputs, heads, RULES)
    for i, rule in enumerate(RULES):
        others = [j for j, other in enumerate(RULES) if other == rule and j != i]
        total = torch.zeros(32)
        for b, h in heads:
            weight = blocks_of(hf_model)[b].self_attn.o_proj.weight[:, 8 * h : 8 * h + 8]
            total += weight.detach() @ outputs[b, others, h].mean(dim=0)
        torch.testing.assert_close(own[i], total, atol=1e-5, rtol=1e-4)
    # Of all heads of a block, it is the mean of what its attention adds.
    every = function_vectors(tiny_llama, outputs, [(2, h) for h in range(4)], ["r"] * 8)
    with torch.no_grad():
        added = projection(blocks_of(hf_model)[2])(outputs[2].flatten(1))
    expected = tensors.mean_of_others(added[None], ["r"] * 8)[0]
    torch.testing.assert_close(every, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("base", ["dummy", "zero-shot"])
def test_a_sweep_equals_patches_by_hand(tiny_llama: Model, base: Any) -> None:
    heads = [(0, 1), (2, 3)]
    frame = icl.function_vector_sweep(
        tiny_llama, EPISODES, heads, layers=[1, 4], base=base, setup=WITH_Z
    ).to_frame()
    names = ["zero-shot", "dummy", "few-shot", "function vector", "function vector, random"]
    names += ["function vector, random heads", "function vector, opposite"]
    assert frame["condition"].unique().tolist() == names
    made = {
        kind: [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in some]
        for kind, some in {
            "few-shot": EPISODES,
            "opposite": [e.opposite() for e in EPISODES],
            "dummy": [e.dummy(["z"]) for e in EPISODES],
            "zero-shot": [e.zero_shot() for e in EPISODES],
        }.items()
    }
    for name, kind in (("function vector", "few-shot"), ("function vector, opposite", "opposite")):
        outputs = head_outputs(tiny_llama, made[kind])
        vectors = function_vectors(tiny_llama, outputs, heads, RULES, answers=ANSWERS)
        at = [prompt.answer for prompt in made[base]]
        for layer in (1, 4):
            write = Patch(layer, positions=[[p] for p in at], values=vectors, mode="add")
            final = capture(
                tiny_llama, made[base], layers=[4], positions=[[p] for p in at], patches=[write]
            )
            answers = read_answers(tiny_llama, final.stack[0], made[base])
            mine = frame[(frame["condition"] == name) & (frame["layer"] == layer)]
            assert mine["prompt"].tolist() == list(range(8))
            torch.testing.assert_close(
                torch.tensor(mine["logit_diff"].tolist(), dtype=torch.float32),
                answers.logit_diff,
                atol=1e-4,
                rtol=1e-3,
            )
            assert mine["correct"].tolist() == answers.correct.tolist()


@pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")
def test_the_table_joins_that_of_a_patching_sweep(tiny_llama: Model) -> None:
    how: dict[str, Any] = {"setup": WITH_Z, "layers": [1, 3]}
    patched = icl.patch_sweep(tiny_llama, EPISODES, **how).to_frame()
    alone = icl.function_vector_sweep(tiny_llama, EPISODES, [(1, 1)], **how).to_frame()
    floors = alone["layer"] < 0
    pd.testing.assert_frame_equal(alone[floors], patched[patched["layer"] < 0], rtol=1e-4)
    both = stats.summarise(pd.concat([patched, alone[~floors]]))
    figure = plots.plot(
        both,
        "patching",
        conditions=["final position", *[c for c in both["condition"].unique() if "function" in c]],
    )
    assert "random heads" in legend(figure)
    assert_readable(figure)


def test_word_pairs_have_no_opposite_and_all_heads_no_others(tiny_llama: Model) -> None:
    pairs = tasks.task([[c, c.upper()] for c in "abcdefgh"], name="upper")
    episodes = pairs.episodes(4, shots=2)
    every = [(b, h) for b in range(4) for h in range(4)]
    frame = icl.function_vector_sweep(
        tiny_llama, episodes, every, layers=[2], setup=icl.PromptSetup(TIGHT, ("Z",))
    ).to_frame()
    patched = frame.loc[frame["layer"] >= 0, "condition"]
    assert list(patched.unique()) == ["function vector", "function vector, random"]


def _effects(model: Model, **changed: Any) -> None:
    icl.head_effects(model, **{"episodes": EPISODES, **HOW} | changed)


def _sweep(model: Model, **changed: Any) -> None:
    icl.function_vector_sweep(model, **{"episodes": EPISODES, "heads": [(0, 0)], **HOW} | changed)


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (_effects, {"blocks": [4]}, r"blocks=\[4\] was given, .* blocks 0 to 3 of"),
        (_effects, {"n": 9}, "n=9 .* expected 1 to 8 prompts"),
        (_effects, {"n": 0}, "n=0"),
        (_effects, {"episodes": EPISODES[:1]}, "has one prompt only"),
        (_effects, {"settings": Settings(memory_limit=1e-6)}, "Ask for fewer blocks"),
        (_sweep, {"heads": []}, r"heads=\[\] was given"),
        (_sweep, {"heads": [(0, 4)]}, r"Heads \[\(0, 4\)\] were given; .* heads 0 to 3"),
        (_sweep, {"heads": [(0, 1), (0, 1)]}, "each once"),
        (_sweep, {"layers": [5]}, r"\[5\] lie outside"),
        (_sweep, {"episodes": EPISODES[:1]}, "has one prompt only"),
    ],
)
def test_bad_input_is_refused(
    tiny_llama: Model, call: Callable[..., None], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_llama, **changed)


def test_outputs_must_be_those_of_the_blocks(tiny_llama: Model) -> None:
    outputs = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match="Outputs of 2 blocks were given for the blocks"):
        head_contributions(tiny_llama, outputs)
    with pytest.raises(ValueError, match="need those of all 4"):
        function_vectors(tiny_llama, outputs, [(0, 0)], ["r"] * 3)
    with pytest.raises(ValueError, match="2 groups were given for 3 prompts"):
        function_vectors(tiny_llama, torch.zeros(4, 3, 4, 8), [(0, 0)], ["r"] * 2)


def test_a_map_of_effects() -> None:
    rows = [
        {"task": task, "block": b, "head": h, "prompt": i, "effect": b - h + i + 0.5}
        for task in ("one", "other")
        for b in range(30)
        for h in range(9)
        for i in range(2)
    ]
    frame = pd.DataFrame(rows)
    figure = plots.plot(frame, "heads", chosen=[(29, 0), (3, 3)])
    assert_readable(figure)
    image = figure.axes[0].collections[0]
    assert image.get_array()[2, 7] == 7 - 2 + 1
    assert image.get_clim() == (-30, 30)
    assert [panel.get_title() for panel in figure.axes[:2]] == ["one", "other"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[29, 0], [3, 3]]
    with pytest.raises(ValueError, match=r"the heads \[\(0, 9\)\], which the table lacks"):
        plots.plot(frame, "heads", chosen=[(0, 9)])
    with pytest.raises(ValueError, match="needs the columns .*'effect'"):
        plots.plot(frame.drop(columns="effect"), "heads")
