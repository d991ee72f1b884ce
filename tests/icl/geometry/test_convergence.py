"""Cosine similarity of rule vectors against a plain double loop; probes on known contents."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from spade_lens import icl
from spade_lens.icl.geometry.convergence import check_center, check_shape
from spade_lens.icl.geometry.probes import _crossed, _splits

RULE = torch.tensor([0, 0, 1, 1, 1, 2])
LABEL = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])


def some_vectors(n_layers: int = 2) -> Tensor:
    return torch.randn(n_layers, 6, 3, 5) + 1.0


def by_hand(vectors: Tensor, comparison: str, labels: str, center: str) -> float | None:
    """The mean over pairs of prompts of the mean cosine over pairs of their vectors."""
    x = vectors.double()
    if center == "all":
        x = x - x.reshape(-1, x.shape[-1]).mean(dim=0)
    if center == "label":
        x = x.clone()
        for value in LABEL.unique():
            x[LABEL == value] -= x[LABEL == value].mean(dim=0)
    means = []
    for i, j in product(range(len(x)), repeat=2):
        kind = "within a prompt" if i == j else "across rules"
        if i != j and RULE[i] == RULE[j]:
            kind = "prompts of one rule"
        cosines = [
            float(torch.cosine_similarity(x[i, a], x[j, b], dim=0))
            for a, b in product(range(3), repeat=2)
            if (i, a) != (j, b)
            and (labels == "any" or (LABEL[i, a] == LABEL[j, b]) == (labels == "same"))
        ]
        if kind == comparison and cosines:
            means.append(np.mean(cosines))
    return float(np.mean(means)) if means else None


@pytest.mark.parametrize("center", ["all", "label", "none"])
def test_similarity_equals_the_double_loop(center: str) -> None:
    vectors = some_vectors()
    frame = icl.convergence(
        icl.RuleVectors(vectors, layers=(4, 9)), rule=RULE, label=LABEL, center=center
    )
    own = frame[~frame["control"]]
    assert len(own) == 2 * 3 * 3
    for row in own.itertuples():
        at = vectors[[4, 9].index(row.layer)]
        assert row.mean == pytest.approx(by_hand(at, row.comparison, row.labels, center))
        assert row.low <= row.high


def test_vectors_may_be_taken_off() -> None:
    vectors = some_vectors()
    middle = torch.randn(2, 5)
    frame = icl.convergence(vectors, rule=RULE, label=LABEL, center=middle)
    there = icl.convergence(vectors - middle[:, None, None], rule=RULE, label=LABEL, center="none")
    pd.testing.assert_frame_equal(frame, there, rtol=1e-5)
    own = icl.convergence(vectors, center=vectors.mean(dim=(1, 2)))
    pd.testing.assert_frame_equal(own, icl.convergence(vectors), rtol=1e-5)
    with pytest.raises(ValueError, match="2 layers and width 5; give one vector for every layer"):
        check_center(torch.randn(1, 5), vectors, None)


def test_what_converges_is_seen_to_converge() -> None:
    """Noise first, then a vector of the rule grows out of it."""
    direction, noise = torch.randn(3, 32), torch.randn(4, 30, 6, 32)
    rule = torch.arange(30) % 3
    strength = torch.tensor([0.0, 0.5, 1.0, 4.0])[:, None, None, None]
    frame = icl.convergence(noise + strength * direction[rule][:, None], rule=rule)
    table = frame[~frame["control"]].pivot(index="layer", columns="comparison", values="mean")
    gap = table["prompts of one rule"] - table["across rules"]
    assert abs(gap[0]) < 0.02
    assert gap.is_monotonic_increasing and gap[3] > 1
    control = frame[frame["control"]].set_index(["layer", "comparison"])
    assert set(control.index.get_level_values(1)) == {"prompts of one rule", "across rules"}
    null = control.loc[(3, "prompts of one rule")]
    assert null["low"] <= null["mean"] <= null["high"] < table["prompts of one rule"][3] / 2


def test_intervals_hold_the_mean_and_narrow_with_prompts() -> None:
    widths = []
    for n in (10, 160):
        torch.manual_seed(1)
        vectors = torch.randn(1, n, 4, 8) + 2 * torch.randn(8)
        frame = icl.convergence(vectors, center="none")
        row = frame.set_index("comparison").loc["prompts of one rule"]
        assert row["low"] <= row["mean"] <= row["high"] and row["n"] == n
        widths.append(row["high"] - row["low"])
    assert widths[1] < widths[0] / 2


def test_a_single_vector_of_a_prompt_has_no_pair_within() -> None:
    frame = icl.convergence(torch.randn(1, 5, 1, 4))
    assert frame["comparison"].tolist() == ["prompts of one rule"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"center": "mean"}, "center='mean' was given"),
        ({"center": "label"}, "Give label= as well"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        icl.convergence(some_vectors(), **changed)  # type: ignore[arg-type]


def test_ids_of_another_shape_are_refused() -> None:
    check_shape("rule", None, (6,))
    check_shape("rule", RULE, (6,))
    with pytest.raises(ValueError, match=r"rule has shape \(6,\), but .* of 5 prompts"):
        check_shape("rule", RULE, (5,))
    with pytest.raises(ValueError, match=r"of 6 prompts of 2 demonstrations; expected \(6, 2\)"):
        check_shape("label", LABEL, (6, 2))


# --- probes -------------------------------------------------------------------------------------


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    label = torch.randint(0, 2, (30, 4))
    vectors = torch.randn(2, 30, 4, 12)
    vectors[1, ..., 3] += 6 * label
    frame = icl.probe(icl.RuleVectors(vectors, layers=(0, 7)), label, shuffles=3).set_index(
        ["layer", "control"]
    )
    assert frame.loc[(7, False), "mean"] > 0.97
    assert frame.loc[(7, False), "low"] > 0.85
    for at in [(0, False), (0, True), (7, True)]:
        assert 0.3 < frame.loc[at, "mean"] < 0.7
    assert frame["chance"].iloc[0] == pytest.approx(
        max(label.float().mean(), 1 - label.float().mean())
    )
    assert (frame["n"] == 30).all()


def test_what_is_special_to_a_prompt_does_not_help() -> None:
    """Every prompt has a corner of its own, in which its class could be learned by heart."""
    rule = torch.arange(24) % 2
    vectors = 8 * torch.eye(24)[None, :, None].expand(1, 24, 5, 24) + 0.1 * torch.randn(
        1, 24, 5, 24
    )
    frame = icl.probe(vectors, rule, folds=4)
    assert frame["mean"].max() < 0.75
    # And prompts that share words can be kept together.
    pair = torch.arange(24) // 2
    shared = 8 * torch.eye(12)[pair][None, :, None].expand(1, 24, 5, 12)
    by_pair = torch.arange(12) % 2
    assert icl.probe(shared, by_pair[pair], folds=4)["mean"].iloc[0] > 0.6
    held = icl.probe(shared, by_pair[pair], groups=pair, folds=4)
    assert held["mean"].iloc[0] <= 0.6 and held["n"].iloc[0] == 12


def test_words_known_by_heart_are_no_class() -> None:
    """Every word has a corner of its own, in which its class can be learned by heart."""
    words = torch.stack([torch.randperm(20)[:4] for _ in range(60)])
    category = words % 2
    by_heart = 8 * torch.nn.functional.one_hot(words, 20)[None].float()
    assert icl.probe(by_heart, category, shuffles=0)["mean"].iloc[0] == 1.0
    frame = icl.probe(by_heart, category, words=words, shuffles=5).set_index("control")
    assert (frame["mean"] < 0.6).all()
    assert frame["n"].tolist() == [20, 20]
    # What a word shares with others of its class is found all the same, and only there.
    told = torch.cat([by_heart, category[None, ..., None] * torch.ones(20)], dim=-1)
    frame = icl.probe(told, category, words=words, shuffles=5).set_index("control")
    assert frame.loc[False, "mean"] > 0.97 and frame.loc[True, "mean"] < 0.7


def test_neither_prompts_nor_words_are_on_both_sides() -> None:
    """Where a prompt's own corner gives the class away, disjoint words alone would not do."""
    rule = torch.arange(24) % 2
    words = torch.stack([torch.randperm(16)[:5] for _ in range(24)])
    own = 8 * torch.eye(24)[None, :, None].expand(1, 24, 5, 24)
    frame = icl.probe(own, rule, words=words, folds=4, shuffles=0)
    assert frame["mean"].iloc[0] < 0.75
    prompt = np.repeat(np.arange(24), 5)
    pairs = _crossed(_splits(prompt, 4, "groups"), _splits(words.numpy().ravel(), 3, "words"))
    tested = np.concatenate([test for _, test in pairs])
    assert sorted(tested) == list(range(120))
    for train, test in pairs:
        assert not set(prompt[train]) & set(prompt[test])
        assert not set(words.flatten()[train].tolist()) & set(words.flatten()[test].tolist())


def test_a_probe_is_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, label = torch.randn(1, 12, 3, 6), torch.randint(0, 3, (12, 3))
    vectors[0, ..., 0] += label
    expected = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=5000)),
        vectors[0].reshape(36, 6).double().numpy(),
        label.reshape(36).numpy(),
        groups=np.repeat(np.arange(12), 3),
        cv=GroupKFold(3),
    )
    found = icl.probe(vectors, label, folds=3, strength=0.3, shuffles=0)
    assert found["mean"].tolist() == [pytest.approx(np.mean(expected == label.flatten().numpy()))]


def test_impossible_probes_are_refused() -> None:
    vectors = torch.randn(1, 6, 3, 5)
    with pytest.raises(ValueError, match="needs at least two"):
        icl.probe(vectors, torch.zeros(6, dtype=torch.long), folds=3)
    with pytest.raises(ValueError, match="folds=7 was given; expected 2 to 6"):
        icl.probe(vectors, RULE, folds=7)
    words = torch.arange(18).reshape(6, 3) % 4
    with pytest.raises(ValueError, match="folds=5 was given; expected 2 to 4, the number of diff"):
        icl.probe(vectors, RULE, words=words, folds=5)
    with pytest.raises(ValueError, match=r"Classes \[2\] are of so few prompts or words"):
        icl.probe(vectors, RULE, folds=6)
