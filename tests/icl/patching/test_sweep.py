"""Patching sweeps: every condition equals the same patch by hand; resuming; bad input."""

from collections.abc import Sequence
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from spade_lens import Model, Patch, Prompt, Settings, capture
from spade_lens.icl import (
    Condition,
    PatchSweep,
    PromptSetup,
    default_conditions,
    patch_sweep,
    rule_vectors,
)
from spade_lens.lenses.answers import full_answers, read_answers
from spade_lens.prompts import Template
from spade_lens.stats import choose_layer, summarise
from spade_lens.tasks import Episode, RuleTask, WordPairTask, task
from spade_lens.tasks.episodes import check_episodes

pytestmark = pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
TASK = RuleTask("t", {"x": ("a", "bb", "ccc", "d", "ee"), "y": ("ff", "g", "hhh", "i", "jj")})
EPISODES = TASK.episodes(8, shots=4)
REVERSED = [replace(e, demonstrations=e.demonstrations[::-1]) for e in EPISODES]
"""A source of our own, which the library does not know."""
OTHER = RuleTask("u", {"x": tuple("pqrst"), "y": tuple("klmno")}).episodes(8, shots=4)
HOW: dict[str, Any] = {"setup": PromptSetup(TIGHT, ("z", "zz"))}
WITH_OTHER = default_conditions(EPISODES, other=OTHER)


def prompts_of(model: Model, episodes: Sequence[Episode]) -> list[Prompt]:
    return [episode.prompt(model.tokenizer, template=TIGHT) for episode in episodes]


def dummies(model: Model) -> list[Prompt]:
    return prompts_of(model, [e.dummy(("z", "zz")) for e in EPISODES])


def by_hand(model: Model, i: int, writes: dict[int, dict[int, torch.Tensor]], mode: str) -> float:
    """The logit difference of one dummy prompt, run whole, with vectors by layer and position."""
    prompt = dummies(model)[i]
    patches = [
        Patch(layer, prompts=(0,), positions=(position,), values=vector, mode=mode)
        for layer, at in writes.items()
        for position, vector in at.items()
    ]
    final = capture(model, [prompt], layers=[4], positions=[[prompt.answer]], patches=patches)
    return float(read_answers(model, final.stack[0], [prompt]).logit_diff[0])


def own(model: Model, episodes: Sequence[Episode], i: int, layer: int, demo: int) -> torch.Tensor:
    """One vector, from a run of one prompt alone; demonstration 4 is the final position."""
    prompt = prompts_of(model, episodes)[i]
    at = [*prompt.spans["labels"], prompt.answer][demo]
    return capture(model, [prompt], layers=[layer], positions=[[at]]).stack[0, 0]


def vector(model: Model, condition: Condition, i: int, layer: int, demo: int) -> torch.Tensor:
    """What a condition writes, by plain loops."""
    relatives = {
        "shuffled": [e.shuffled(i) for i, e in enumerate(EPISODES)],
        "opposite": [e.opposite() for e in EPISODES],
    }
    episodes = condition.episodes or relatives.get(condition.source, EPISODES)
    if condition.source == "wrong layer":
        layer = (layer + 2) % 5
    if condition.mean == "none":
        return own(model, episodes, i, layer, demo)
    same = [k for k in range(8) if episodes[k].rule == episodes[i].rule and k != i]
    places = [(k, demo) for k in same]
    if condition.mean == "label":
        label = episodes[i].demonstrations[demo][1]
        places = [
            (k, d) for k in same for d in range(4) if episodes[k].demonstrations[d][1] == label
        ]
    if condition.mean == "rule":
        answers = {episodes[k].answer for k in same}
        cells = [
            [own(model, episodes, k, layer, demo) for k in same if episodes[k].answer == answer]
            for answer in answers
        ]
        return torch.stack([torch.stack(some).mean(dim=0) for some in cells]).mean(dim=0)
    return torch.stack([own(model, episodes, k, layer, d) for k, d in places]).mean(dim=0)


@pytest.mark.parametrize(
    "condition",
    [
        Condition("labels"),
        Condition("some", demos=(0, -1)),
        Condition("shuffled", source="shuffled"),
        Condition("opposite", source="opposite"),
        Condition("other", source=OTHER),
        Condition("reversed", source=REVERSED),
        Condition("reversed final", source=REVERSED, site="final", mean="rule"),
        Condition("wrong", source="wrong layer"),
        Condition("mean", mean="rule"),
        Condition("label mean", mean="label", source="opposite"),
        Condition("final", site="final"),
        Condition("final mean", site="final", mean="rule"),
        Condition("window", window=2),
        Condition("all", window=None),
        Condition("add", mode="add", scale=0.5),
    ],
    ids=lambda condition: condition.name,
)
def test_equals_the_same_patch_by_hand(tiny_llama: Model, condition: Condition) -> None:
    layers = [1, 3]
    frame = patch_sweep(
        tiny_llama, EPISODES, conditions=[condition], layers=layers, **HOW
    ).to_frame()
    found = frame[frame["layer"] >= 0].set_index(["layer", "prompt"])["logit_diff"]
    assert len(found) == 16
    written = {"window": 2, "all": 99}.get(condition.name, 1)
    demos = {"some": [0, 3]}.get(condition.name, [0, 1, 2, 3])
    for layer in layers:
        for i in (0, 5):
            prompt = dummies(tiny_llama)[i]
            at = {d: prompt.spans["labels"][d] for d in demos}
            at = at if condition.site == "labels" else {4: prompt.answer}
            writes = {
                k: {
                    p: condition.scale * vector(tiny_llama, condition, i, k, d)
                    for d, p in at.items()
                }
                for k in range(layer, min(5, layer + written))
            }
            expected = by_hand(tiny_llama, i, writes, condition.mode)
            assert found[layer, i] == pytest.approx(expected, abs=1e-4)


def test_random_vectors_have_the_norms(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Patch] = []
    from spade_lens.icl.patching import sweep as patching

    whole = patching.replay

    def spy(model: Model, residuals: Any, rows: Any, patches: Any, **options: Any) -> Any:
        seen.extend(patches)
        return whole(model, residuals, rows, patches, **options)

    monkeypatch.setattr(patching, "replay", spy)
    conditions = [Condition("random", source="random"), Condition("labels")]
    patch_sweep(tiny_llama, EPISODES, conditions=conditions, layers=[2], **HOW)
    random, real = (patch.values for patch in seen)
    torch.testing.assert_close(random.norm(dim=-1), real.norm(dim=-1))
    assert torch.cosine_similarity(random, real, dim=-1).abs().max() < 0.9
    expected = rule_vectors(tiny_llama, prompts_of(tiny_llama, EPISODES), layers=[2]).tensor[0]
    torch.testing.assert_close(real, expected.flatten(0, 1), atol=1e-4, rtol=0.0)


def test_baselines_and_columns(tiny_llama: Model) -> None:
    frame = patch_sweep(tiny_llama, EPISODES, layers=[2], conditions=WITH_OTHER, **HOW).to_frame()
    assert list(frame) == [
        "task", "condition", "layer", "prompt", "correct", "prefers", "logit_diff", "ambiguous",
    ]  # fmt: skip
    assert len(frame) == 8 * (3 + len(WITH_OTHER))
    for name, episodes in {
        "zero-shot": [e.zero_shot() for e in EPISODES],
        "dummy": [e.dummy(("z", "zz")) for e in EPISODES],
        "few-shot": EPISODES,
    }.items():
        expected = full_answers(tiny_llama, prompts_of(tiny_llama, episodes)).to_frame()
        rows = frame[frame["condition"] == name].reset_index(drop=True)
        assert set(rows["layer"]) == {-1}
        pd.testing.assert_frame_equal(rows[list(expected)], expected, atol=1e-4, rtol=0)


def test_little_memory_changes_nothing(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = patch_sweep(tiny_llama, EPISODES, layers=[1], conditions=WITH_OTHER, **HOW).to_frame()
    little = patch_sweep(
        tiny_llama,
        EPISODES,
        layers=[1],
        conditions=WITH_OTHER,
        settings=Settings(memory_limit=0.002),
        **HOW,
    ).to_frame()
    pd.testing.assert_frame_equal(little, whole, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="more than fits memory_limit"):
        patch_sweep(tiny_llama, EPISODES, layers=[1], settings=Settings(memory_limit=0.0001), **HOW)


def test_patched_at_the_last_layer_the_final_position_is_the_few_shot_answer(
    tiny_llama: Model,
) -> None:
    frame = patch_sweep(tiny_llama, EPISODES, layers=[4], **HOW).to_frame()
    by = frame.groupby("condition")["logit_diff"].apply(list)
    assert by["final position"] == pytest.approx(by["few-shot"], abs=1e-4)
    assert by["labels"] == pytest.approx(by["dummy"], abs=1e-4)


def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = patch_sweep(tiny_llama, EPISODES, layers=[0, 1, 2], **HOW).to_frame()
    patch_sweep(tiny_llama, EPISODES, layers=[0, 2], folder=tmp_path, **HOW)
    (tmp_path / "layer-002.json").unlink()
    resumed = patch_sweep(tiny_llama, EPISODES, layers=[0, 1, 2], folder=tmp_path, **HOW).to_frame()
    pd.testing.assert_frame_equal(resumed, whole, atol=1e-4, rtol=0)
    monkeypatch.setattr(Model, "run_blocks", lambda *_, **__: pytest.fail("compute was spent"))
    again = patch_sweep(tiny_llama, EPISODES, layers=[0, 1, 2], folder=tmp_path, **HOW).to_frame()
    pd.testing.assert_frame_equal(again, resumed)
    with pytest.raises(ValueError, match="another run; .*seed"):
        other_seed = replace(HOW["setup"], seed=1)
        patch_sweep(tiny_llama, EPISODES, layers=[0], folder=tmp_path, setup=other_seed)


@pytest.mark.filterwarnings("error")
def test_chance_is_said_also_of_what_is_on_disk(tiny_llama: Model, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="On task 't' the model prefers .* nothing to explain"):
            patch_sweep(tiny_llama, EPISODES, layers=[4], folder=tmp_path, **HOW)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"episodes": []}, "No episodes were given"),
        ({"episodes": [EPISODES[0], EPISODES[1].first(2)]}, r"with \[2, 4\] demonstrations"),
        ({"episodes": [EPISODES[0].zero_shot()]}, r"with \[0\] demonstrations"),
        ({"episodes": [EPISODES[0], OTHER[0]]}, r"tasks \['t', 'u'\]"),
        ({"layers": [5]}, r"\[5\] lie outside"),
        ({"conditions": []}, "No conditions were given"),
        ({"conditions": [Condition("a"), Condition("a")]}, "Two conditions have one name"),
        (
            {"conditions": [Condition("a", source=OTHER[:3])]},
            "'a' has 3 episodes of 4 demonstrations; expected 8 of 4",
        ),
        ({"conditions": [Condition("a", demos=(4,))]}, r"demonstrations \(4,\); expected distinct"),
        ({"conditions": [Condition("a", demos=(3, -1))]}, r"\(3, -1\); expected distinct"),
        ({"episodes": EPISODES[:2]}, "no mean of others"),
        ({"setup": PromptSetup()}, "'A' is not a single token"),
    ],
)
def test_wrong_sweeps_are_named(
    tiny_llama: Model, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "run_blocks", lambda *_, **__: pytest.fail("compute was spent"))
    with pytest.raises(ValueError, match=message):
        patch_sweep(tiny_llama, **{"episodes": EPISODES, **HOW, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "own prompt"}, "source='own prompt' was given; expected one of"),
        ({"site": "label"}, "site='label' was given"),
        ({"mean": "all"}, "mean='all' was given"),
        ({"mode": "sum"}, "mode='sum' was given"),
        ({"window": 0}, "window=0 was given"),
        ({"demos": ()}, "patches no demonstration"),
        ({"site": "final", "demos": (0,)}, "patches the final position"),
        ({"site": "final", "mean": "label"}, "patches the final position"),
        ({"source": OTHER, "mean": "label"}, "source=<8 episodes of 'u'> was given"),
        ({"source": "shuffled", "mean": "label"}, "source='shuffled' was given"),
    ],
)
def test_wrong_conditions_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition("c", **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TASK, "episodes is of type RuleTask; expected episodes, as task.episodes"),
        ([Prompt((1, 2))], "Episode 0 is of type Prompt; expected episodes"),
        ("animal/country", "episodes is of type str"),
    ],
)
def test_what_is_no_episode_is_named(wrong: Any, message: str) -> None:
    unchecked = unwrap(check_episodes)  # of annotations, as users run it
    with pytest.raises(TypeError, match=message):
        unchecked(wrong)


def test_a_sweep_comes_back_from_disk(tiny_llama: Model, tmp_path: Path) -> None:
    sweep = patch_sweep(tiny_llama, EPISODES, conditions=[Condition("labels")], layers=2, **HOW)
    assert repr(sweep) == "PatchSweep(t: 1 condition x 1 layer x 8 prompts; tiny-llama)"
    path = sweep.save(tmp_path / "new" / "sweep.csv")
    again = PatchSweep.load(path)
    pd.testing.assert_frame_equal(again.to_frame(), sweep.to_frame(), check_exact=True)
    assert again.about["seed"] == 0 and repr(again) == repr(sweep)
    pd.testing.assert_frame_equal(again.summary(), summarise(sweep))
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        sweep.save(tmp_path / "sweep.txt")


def test_summary_and_choice() -> None:
    rows = [
        {
            "task": "t", "condition": c, "layer": layer, "prompt": i,
            "correct": i % 2 == 0, "prefers": diff > 0, "logit_diff": diff,
        }
        for c, best in (("labels", 1), ("arrow", 3))
        for layer in range(4)
        for i in range(6)
        for diff in [float(i - 2 + (layer == best))]
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    summary = summarise(frame).set_index(["condition", "layer", "measure"])
    assert summary.loc[("labels", 0, "accuracy"), "mean"] == 0.5
    assert summary.loc[("labels", 0, "preference"), "mean"] == 0.5
    assert summary.loc[("labels", 0, "flips"), "mean"] == pytest.approx(1 / 3)
    diff = summary.loc[("labels", 0, "logit_diff")]
    assert (diff["mean"], diff["n"]) == (0.5, 6)
    assert diff["low"] == pytest.approx(-1.463, abs=1e-3)  # by hand: 0.5 - 2.5706 * 1.8708 / √6
    layer, rest = choose_layer(frame, "arrow")
    assert layer == 3 and sorted(rest["prompt"].unique()) == [3, 4, 5]
    assert set(rest["condition"]) == {"labels", "arrow"}
    # Right more often comes before a higher logit difference.
    right = frame.assign(correct=(frame["condition"] == "arrow") & (frame["layer"] == 1))
    assert choose_layer(right, "arrow")[0] == 1
    assert choose_layer(right, "arrow", measures=["logit_diff"])[0] == 3
    for wrong, message in [
        ({"condition": "x"}, "the frame's conditions are"),
        ({"condition": "labels", "measures": ["x"]}, r"measures=\['x'\].* lacks \['x'\]"),
        ({"condition": "labels", "held_out": 1.0}, "leaves 6 to choose on and 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_layer(frame, **wrong)
    with pytest.raises(ValueError, match="has no rows"):
        summarise(frame[:0])
    with pytest.raises(ValueError, match=r"lacks \['prefers'\]"):
        summarise(frame.drop(columns="prefers"), ["prefers"])


def test_knowledge_has_no_opposite_but_all_the_rest(tiny_llama: Model) -> None:
    pairs = WordPairTask("caps", tuple((c, c.upper()) for c in "abcdefghij"))
    episodes = pairs.episodes(4, shots=3)
    names = [c.name for c in default_conditions(episodes)]
    assert "labels to the top" in names and not any("opposite" in name for name in names)
    frame = patch_sweep(tiny_llama, episodes, layers=[4], **HOW).to_frame()
    by = frame.groupby("condition")["logit_diff"].apply(list)
    assert by["final position"] == pytest.approx(by["few-shot"], abs=1e-4)
    with pytest.raises(ValueError, match="negative label"):
        patch_sweep(tiny_llama, episodes, conditions=[Condition("m", mean="label")], **HOW)
    with pytest.raises(ValueError, match="has no labels"):
        opposite = [Condition("o", source="opposite")]
        patch_sweep(tiny_llama, episodes, conditions=opposite, **HOW)


@pytest.mark.download
@pytest.mark.filterwarnings("error")
def test_rule_vectors_carry_the_rule_of_the_real_model(smollm2: Model) -> None:
    conditions = [
        Condition("own", window=None),
        Condition("opposite", source="opposite", window=None),
    ]
    episodes = task("animal/country").episodes(12, shots=8)
    frame = patch_sweep(smollm2, episodes, conditions=conditions, layers=[12]).to_frame()
    prefers = frame.groupby("condition")["prefers"].mean()
    assert prefers["few-shot"] > 0.8
    assert prefers["own"] > 0.7 and prefers["opposite"] < 0.4
