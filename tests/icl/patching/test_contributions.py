"""Contributions: Shapley values against all orders, worths against whole runs, resuming."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from spade_lens import Model, Patch, Settings, capture
from spade_lens.icl import Coalitions, PromptSetup, measure_contributions
from spade_lens.icl.patching.shapley import (
    all_coalitions,
    coalitions_of,
    effective_number,
    sampled_orders,
    shapley_exact,
    shapley_sampled,
)
from spade_lens.lenses.answers import full_answers, read_answers
from spade_lens.prompts import Template
from spade_lens.stats import summarise
from spade_lens.tasks import Episode, RuleTask, WordPairTask

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
TASK = RuleTask("t", {"x": ("a", "bb", "ccc", "d", "ee"), "y": ("ff", "g", "hhh", "i", "jj")})
EPISODES = TASK.episodes(3, shots=4)
HOW: dict[str, Any] = {"setup": PromptSetup(TIGHT, ("z", "zz"))}

# --- Shapley values -----------------------------------------------------------------------------


def brute_force(worth: torch.Tensor) -> torch.Tensor:
    """The mean gain over all orders of the players."""
    n = len(worth).bit_length() - 1
    gains = torch.zeros(n)
    orders = list(permutations(range(n)))
    for order in orders:
        number = 0
        for player in order:
            gains[player] += worth[number + 2**player] - worth[number]
            number += 2**player
    return gains / len(orders)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_exact_values_are_means_over_all_orders(n: int) -> None:
    worth = torch.randn(2**n)
    values = shapley_exact(worth)
    torch.testing.assert_close(values, brute_force(worth), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.sum(), worth[-1] - worth[0])


def test_sampled_values_are_near_the_exact_ones_and_sum_to_the_whole() -> None:
    n = 6
    worth = torch.randn(2**n)
    orders = sampled_orders(n, 4000, seed=1)
    numbers = (coalitions_of(orders) * 2 ** torch.arange(n)).sum(dim=-1)
    values, error = shapley_sampled(worth[numbers], orders)
    torch.testing.assert_close(values.sum(), worth[-1] - worth[0], atol=1e-4, rtol=0)
    off = (values - shapley_exact(worth)).abs()
    assert (off < 4 * error).all() and error.max() < 0.1
    # Of a sum of players' own worths every order says the same.
    own = torch.randn(n)
    plain = (all_coalitions(n) * own).sum(dim=1)
    values, error = shapley_sampled(plain[numbers], orders)
    torch.testing.assert_close(values, own, atol=1e-5, rtol=0)
    assert error.max() < 1e-5


def test_coalitions_grow_by_one_in_the_order() -> None:
    orders = sampled_orders(5, 6)
    members = coalitions_of(orders)
    assert members.sum(dim=-1).tolist() == [[0, 1, 2, 3, 4, 5]] * 6
    for order, grown in zip(orders.tolist(), members, strict=True):
        joined = [(grown[k + 1] & ~grown[k]).nonzero().item() for k in range(5)]
        assert joined == order


@pytest.mark.parametrize(
    ("shares", "number"), [([3.0, 0, 0, 0], 1), ([1.0, -1, 1, -1], 4), ([2.0, 1, 0, 0], 1.8)]
)
def test_effective_number(shares: list[float], number: float) -> None:
    assert float(effective_number(torch.tensor(shares))) == pytest.approx(number)


# --- measured on a model ------------------------------------------------------------------------


def worth_by_hand(model: Model, i: int, kept: set[int], layers: list[int], base: str) -> float:
    """The mean over the query and that of the other class, each run whole."""
    return sum(one_worth(model, e, kept, layers, base) for e in EPISODES[i].every_class()) / 2


def one_worth(
    model: Model, episode: Episode, kept: set[int], layers: list[int], base: str
) -> float:
    real, dummy = (
        e.prompt(model.tokenizer, template=TIGHT) for e in (episode, episode.dummy(("z", "zz")))
    )
    run, other = (real, dummy) if base == "few-shot" else (dummy, real)
    foreign = [d for d in range(4) if (d in kept) == (base == "dummy")]
    patches = []
    for layer in layers:
        for d in foreign:
            at = other.spans["labels"][d]
            vector = capture(model, [other], layers=[layer], positions=[[at]]).stack[0, 0]
            patches.append(Patch(layer, 0, run.spans["labels"][d], values=vector))
    final = capture(model, [run], layers=[4], positions=[[run.answer]], patches=patches)
    return float(read_answers(model, final.stack[0], [run]).logit_diff[0])


@pytest.mark.parametrize("base", ["few-shot", "dummy"])
@pytest.mark.parametrize("upward", [True, False])
def test_equals_whole_runs(tiny_llama: Model, base: str, upward: bool) -> None:
    frame = measure_contributions(
        tiny_llama, EPISODES, layers=[1, 3], coalitions=Coalitions(base, upward), **HOW
    )
    assert len(frame) == 3 * 2 * 4
    for layer in (1, 3):
        layers = list(range(layer, 5)) if upward else [layer]
        rows = frame[(frame["prompt"] == 1) & (frame["layer"] == layer)].set_index("demo")
        worth = torch.tensor(
            [
                worth_by_hand(tiny_llama, 1, {d for d in range(4) if number >> d & 1}, layers, base)
                for number in range(16)
            ]
        )
        shapley = brute_force(worth).tolist()
        for d in range(4):
            row = rows.loc[d]
            assert row["shapley"] == pytest.approx(shapley[d], abs=1e-4)
            assert row["add_one_in"] == pytest.approx(float(worth[2**d] - worth[0]), abs=1e-4)
            assert row["leave_one_out"] == pytest.approx(
                float(worth[15] - worth[15 - 2**d]), abs=1e-4
            )
            assert row["none"] == pytest.approx(float(worth[0]), abs=1e-4)
            assert row["all"] == pytest.approx(float(worth[15]), abs=1e-4)
            assert row["error"] == 0
            assert row["label"] == EPISODES[1].demonstrations[d][1]
            assert row["same_label"] == (row["label"] == EPISODES[1].answer)


def test_all_kept_is_the_model_itself(tiny_llama: Model) -> None:
    alone = Coalitions(every_class=False)
    frame = measure_contributions(tiny_llama, EPISODES, layers=[0, 2], coalitions=alone, **HOW)
    prompts = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in EPISODES]
    expected = full_answers(tiny_llama, prompts).logit_diff
    for i in range(3):
        found = frame.loc[frame["prompt"] == i, "all"].unique()
        assert found == pytest.approx([float(expected[i])] * len(found), abs=1e-4)
    sums = frame.groupby(["prompt", "layer"])["shapley"].sum()
    whole = frame.groupby(["prompt", "layer"])[["all", "none"]].first()
    assert sums.tolist() == pytest.approx((whole["all"] - whole["none"]).tolist(), abs=1e-4)


def test_sampled_is_near_exact(tiny_llama: Model) -> None:
    exact = measure_contributions(tiny_llama, EPISODES, layers=[1], **HOW)
    options = {"coalitions": Coalitions(exact_up_to=0, orders=400), **HOW}
    with Settings(batch_size=5):
        sampled = measure_contributions(tiny_llama, EPISODES, layers=[1], **options)
    for column in ("leave_one_out", "add_one_in", "none", "all"):
        assert sampled[column].tolist() == pytest.approx(exact[column].tolist(), abs=1e-4)
    off = (sampled["shapley"] - exact["shapley"]).abs()
    assert (off < 4 * sampled["error"] + 1e-4).all()
    assert (sampled["error"] > 0).any()


def test_little_memory_changes_nothing(tiny_llama: Model) -> None:
    whole = measure_contributions(tiny_llama, EPISODES[:1], layers=[1], **HOW)
    little = measure_contributions(
        tiny_llama, EPISODES[:1], layers=[1], settings=Settings(memory_limit=0.001), **HOW
    )
    pd.testing.assert_frame_equal(little, whole, atol=1e-4, rtol=0)


def test_knowledge_has_the_query_alone(tiny_llama: Model) -> None:
    pairs = WordPairTask("caps", tuple((c, c.upper()) for c in "abcdefghij"))
    episodes = pairs.episodes(2, shots=3)
    frame = measure_contributions(tiny_llama, episodes, layers=[2], **HOW)
    prompts = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in episodes]
    expected = full_answers(tiny_llama, prompts).logit_diff.tolist()
    assert frame["all"].tolist() == pytest.approx([e for e in expected for _ in range(3)], abs=1e-4)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_contributions(tiny_llama, EPISODES, layers=[1], folder=tmp_path, **HOW)
    (tmp_path / "prompt-0001.json").unlink()
    again = measure_contributions(tiny_llama, EPISODES, layers=[1], folder=tmp_path, **HOW)
    pd.testing.assert_frame_equal(again, first)
    with pytest.raises(ValueError, match="another run; .*base"):
        measure_contributions(
            tiny_llama,
            EPISODES,
            layers=[1],
            folder=tmp_path,
            coalitions=Coalitions(base="dummy"),
            **HOW,
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [7]}, r"\[7\] lie outside"),
        ({"episodes": []}, "No episodes were given"),
        ({"episodes": EPISODES[:1] + [EPISODES[1].first(3)]}, r"with \[3, 4\] demonstrations"),
    ],
)
def test_wrong_requests_are_named(
    tiny_llama: Model, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "run_blocks", lambda *_, **__: pytest.fail("compute was spent"))
    with pytest.raises(ValueError, match=message):
        measure_contributions(tiny_llama, **{"episodes": EPISODES, "layers": [1], **HOW, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": "both"}, "base='both' was given"),
        ({"exact_up_to": 17}, "exact_up_to=17 was given"),
        ({"orders": 5}, "orders=5 was given; expected an even number"),
    ],
)
def test_a_wrong_plan_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coalitions(**wrong)


def test_wrong_coalitions_are_named() -> None:
    with pytest.raises(ValueError, match="All coalitions of 17 players"):
        all_coalitions(17)
    with pytest.raises(ValueError, match="worth of 6 coalitions was given"):
        shapley_exact(torch.zeros(6))


def test_concentration_counts_each_prompt_once() -> None:
    frame = pd.DataFrame(
        {
            "task": "t",
            "layer": [1] * 6 + [2] * 6,
            "prompt": [0, 0, 1, 1, 2, 2] * 2,
            "effective": [1.0, 1, 2, 2, 6, 6, *[float("nan")] * 2, 3, 3, 3, 3],
        }
    )
    found = summarise(frame, "effective", by=["task", "layer"])
    assert found["mean"].tolist() == [3, 3]
    assert found["n"].tolist() == [3, 2]
    assert found["low"].tolist()[1] == found["high"].tolist()[1] == 3
    half = 4.302653 * (7 / 3) ** 0.5  # Student's, of 1, 2 and 6
    assert found["low"][0] == pytest.approx(3 - half) and found["high"][0] == pytest.approx(
        3 + half
    )
    with pytest.raises(ValueError, match=r"lacks \['effective'\]"):
        summarise(frame.drop(columns="effective"), "effective")
    with pytest.raises(ValueError, match="has no rows"):
        summarise(frame[:0], "effective")
