"""Demixed PCA: parts add up, known factors are recovered, the regression is at its optimum."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spade_lens import icl
from spade_lens.icl.geometry.dpca import demixed_pca, marginalise
from spade_lens.icl.geometry.dpca_projections import factor_projections

N, DEMOS, WIDTH = 48, 4, 24
RULE = torch.arange(N) % 3
LABEL = (torch.arange(N)[:, None] // 3 + torch.arange(DEMOS)) % 2


def orthonormal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, n))[0].T


def mixture(*, noise: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Vectors with a rule, a label and an index part along known directions, and noise."""
    axes = orthonormal(4)
    rules = torch.tensor([[-(0.75**0.5), -0.5], [0.0, 1.0], [0.75**0.5, -0.5]])
    vectors = 2 * (rules @ axes[:2])[RULE][:, None].expand(N, DEMOS, WIDTH)
    vectors = vectors + 3 * (2 * LABEL[..., None] - 1.0) * axes[2]
    vectors = vectors + (torch.arange(DEMOS) - 1.5)[:, None] * axes[3] + 5
    known = {"rule": axes[:2], "label": axes[2:3], "demo": axes[3:]}
    return vectors + noise * torch.randn(N, DEMOS, WIDTH), known


def by_hand(cells: Tensor, some: str) -> Tensor:
    """A part as the textbook has it, for axes named r, l and d."""

    def mean(keep: str) -> Tensor:
        return cells.mean(dim=[n for n, f in enumerate("rld") if f not in keep], keepdim=True)

    return {
        "r": lambda: mean("r") - cells.mean(dim=(0, 1, 2)),
        "rl": lambda: mean("rl") - mean("r") - mean("l") + cells.mean(dim=(0, 1, 2)),
        "rld": lambda: (
            cells
            - mean("rl")
            - mean("rd")
            - mean("ld")
            + mean("r")
            + mean("l")
            + mean("d")
            - cells.mean(dim=(0, 1, 2))
        ),
    }[some]().expand_as(cells)


def test_parts_add_up_and_are_the_textbooks() -> None:
    cells = torch.randn(3, 2, 4, 6, dtype=torch.double)
    parts = marginalise(cells)
    assert list(parts) == [
        "rule",
        "label",
        "demo",
        "rule x label",
        "rule x demo",
        "label x demo",
        "rule x label x demo",
    ]
    mean = cells.mean(dim=(0, 1, 2))
    torch.testing.assert_close(sum(parts.values()) + mean, cells)
    squares = sum(p.square().sum() for p in parts.values())
    torch.testing.assert_close(squares, (cells - mean).square().sum())
    for name, short in {"rule": "r", "rule x label": "rl", "rule x label x demo": "rld"}.items():
        torch.testing.assert_close(parts[name], by_hand(cells, short))


def test_known_factors_are_recovered() -> None:
    vectors, known = mixture(noise=0.1)
    found = demixed_pca(vectors, rule=RULE, label=LABEL)
    assert sum(found.fraction.values()) == pytest.approx(1)
    for name, axes in known.items():
        encoders = found.encoders[name].float()
        assert len(encoders) == (1 if name == "label" else 2)
        # The known directions lie in the space of the encoders.
        torch.testing.assert_close(
            (axes @ encoders[: len(axes)].T).norm(dim=1), torch.ones(len(axes)), atol=0.01, rtol=0
        )
        assert found.explained[name][: len(axes)].sum() == pytest.approx(
            found.fraction[name], abs=0.02
        )
    readings = found.project(vectors, "label")[..., 0]
    assert ((readings > 0) == (readings[0, 0] > 0)).eq(LABEL == LABEL[0, 0]).all()
    # Expected shares: rule 4, label 9, demonstration 1.25.
    whole = 4 + 9 + 1.25
    for name, variance in {"rule": 4, "label": 9, "demo": 1.25}.items():
        assert found.fraction[name] == pytest.approx(variance / whole, abs=0.01)
    assert all(v < 0.01 for name, v in found.fraction.items() if " x " in name)


def test_the_regression_is_at_its_optimum() -> None:
    """No step away from encoders and decoders lowers the loss that they are to minimise."""
    vectors, _ = mixture(noise=1.0)
    ridge = 0.05
    found = demixed_pca(vectors, rule=RULE, label=LABEL, components=1, ridge=ridge)
    x = vectors.double() - found.mean
    cells = torch.zeros(3, 2, DEMOS, WIDTH, dtype=torch.double)
    for r in range(3):
        for y in range(2):
            for d in range(DEMOS):
                cells[r, y, d] = x[(RULE == r) & (LABEL[:, d] == y), d].mean(dim=0)
    each = cells[RULE[:, None], LABEL, torch.arange(DEMOS)]
    variance = cells.square().sum()

    def loss(encoder: Tensor, decoder: Tensor, part: Tensor) -> Tensor:
        per_cell = N / 6  # balanced: as many vectors in every cell
        fit = (part - cells @ decoder.T @ encoder).square().sum()
        noise = ((x - each) @ decoder.T @ encoder).square().sum() / per_cell
        return fit + noise + ridge * variance * (decoder.T @ encoder).square().sum()

    for name in ("rule", "rule x demo"):
        part = marginalise(cells)[name]
        encoder = found.encoders[name].clone().requires_grad_()
        decoder = found.decoders[name].clone().requires_grad_()
        here = loss(encoder, decoder, part)
        steps = torch.autograd.grad(here, [encoder, decoder])
        for step in steps:
            assert float(step.norm()) < 1e-6 * float(variance)
        for _ in range(20):
            with torch.no_grad():
                other = torch.nn.functional.normalize(torch.randn_like(encoder), dim=-1)
                away = loss(other, decoder.norm() * other, part)
            assert away > here


def test_variance_by_layer_and_its_controls() -> None:
    torch.manual_seed(3)
    quiet, _ = mixture(noise=0.5)
    vectors = torch.stack([torch.randn(N, DEMOS, WIDTH), quiet])
    frame = icl.factor_variance(
        icl.RuleVectors(vectors, layers=(5, 6)), rule=RULE, label=LABEL, shuffles=10
    )
    sums = frame.groupby("layer")["fraction"].sum()
    assert sums.tolist() == [pytest.approx(1), pytest.approx(1)]
    noise = frame[(frame["layer"] == 5) & (frame["factor"] != "rest")]
    # Shares of noise are what shuffled noise has, and two halves do not agree on them.
    assert (noise["fraction"] - noise["control"]).abs().max() < 0.03
    assert noise["held_out"].abs().max() < 0.03
    found = frame[frame["layer"] == 6].set_index("factor")
    whole = 4 + 9 + 1.25 + 0.25 * WIDTH
    for name, variance in {"rule": 4, "label": 9, "demo": 1.25}.items():
        assert found.loc[name, "held_out"] == pytest.approx(variance / whole, abs=0.03)
        assert found.loc[name, "fraction"] > found.loc[name, "control_high"]
    assert np.isnan(found.loc["rest", "held_out"])


def test_projections_are_of_prompts_that_gave_no_component() -> None:
    vectors, _ = mixture(noise=0.5)
    frame = factor_projections(
        icl.RuleVectors(vectors[None], layers=(7,)),
        rule=RULE,
        label=LABEL,
        parts=["label", "rule x label"],
    )
    assert frame["layer"].unique().tolist() == [7]
    shown = sorted(frame["prompt"].unique())
    fitted = sorted(set(range(N)) - set(shown))
    assert len(frame) == 2 * len(shown) * DEMOS and abs(len(shown) - len(fitted)) <= 3
    found = demixed_pca(vectors[fitted], rule=RULE[fitted], label=LABEL[fitted], components=1)
    rows = frame[frame["factor"] == "label"]
    expected = found.project(vectors[shown], "label").flatten().numpy()
    np.testing.assert_allclose(np.abs(rows["value"]), np.abs(expected))
    # The first label lies below 0; names are those of the vectors' places.
    assert ((rows["value"] > 0) == (rows["label"] == 1)).all()
    prompt, demo = rows["prompt"].to_numpy(), rows["demo"].to_numpy()
    assert rows["label"].tolist() == LABEL.numpy()[prompt, demo].tolist()
    assert rows["rule"].tolist() == RULE.numpy()[prompt].tolist()


def test_noise_is_told_apart_on_its_own_half_alone() -> None:
    vectors = torch.randn(1, N, DEMOS, 200)
    frame = factor_projections(vectors, rule=RULE, label=LABEL, parts=["label"])
    right = ((frame["value"] > 0) == (frame["label"] == 1)).mean()
    assert 0.3 < right < 0.7
    own = demixed_pca(vectors[0], rule=RULE, label=LABEL).project(vectors[0], "label")[..., 0]
    own = own if own[LABEL == 1].mean() > 0 else -own
    assert ((own > 0) == (LABEL == 1)).float().mean() > 0.9


def test_unbalanced_cells_count_the_same() -> None:
    """Showing some prompts twice changes no cell's mean where there is no noise, nor any share."""
    vectors, _ = mixture(noise=0.0)
    twice = [*range(N), *range(0, N, 3)]
    once = icl.factor_variance(vectors[None], rule=RULE, label=LABEL, shuffles=0, splits=0)
    more = icl.factor_variance(
        vectors[None, twice], rule=RULE[twice], label=LABEL[twice], shuffles=0, splits=0
    )
    np.testing.assert_allclose(once["fraction"], more["fraction"], atol=1e-6)
    assert list(once.columns) == ["layer", "factor", "fraction"]


def test_a_factor_of_one_value_has_no_part() -> None:
    vectors, _ = mixture(noise=0.1)
    found = demixed_pca(vectors, rule=torch.zeros_like(RULE), label=LABEL)
    assert list(found.fraction) == ["label", "demo", "label x demo"]


def test_bad_input_is_refused() -> None:
    vectors, _ = mixture(noise=0.1)
    with pytest.raises(ValueError, match="2 factors .* were named for an array of shape"):
        marginalise(torch.zeros(2, 2, 2, 5), ["a", "b"])
    with pytest.raises(ValueError, match=r"12 of 24 combinations .* \(0, 0, 1\) among them"):
        demixed_pca(vectors, rule=RULE, label=torch.arange(DEMOS).expand(N, -1) % 2)
    with pytest.raises(ValueError, match="components=0"):
        demixed_pca(vectors, rule=RULE, label=LABEL, components=0)
    with pytest.raises(ValueError, match="All cells have one mean"):
        demixed_pca(torch.zeros_like(vectors), rule=RULE, label=LABEL)
    with pytest.raises(ValueError, match=r"parts=\['task'\] was given; expected some of \['rule'"):
        factor_projections(vectors[None], rule=RULE, label=LABEL, parts=["task"])
    with pytest.raises(ValueError, match="do not know their rules"):
        icl.factor_variance(vectors[None])
    with pytest.raises(ValueError, match="6 prompts are too few to halve"):
        icl.factor_variance(vectors[None, :6], rule=RULE[:6], label=LABEL[:6])
    with pytest.raises(ValueError, match=r"no part 'task'; expected one of \['rule'"):
        demixed_pca(vectors, rule=RULE, label=LABEL).project(vectors, "task")
