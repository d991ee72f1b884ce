"""Fitting: the closed form is least squares, and nothing about the way there changes the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny, tiny_tokenizer

import spade_lens
from spade_lens import Keep, LogitLens, Model, Prompt, Spade, load, read
from spade_lens.lenses.fitting.descent import better_of
from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.fitting.plan import SpadePlan
from spade_lens.lenses.fitting.ridge import Moments, ridge_maps, spectra
from spade_lens.lenses.fitting.rows import Rows, rows_at, split_places
from spade_lens.lenses.fitting.text import CalibrationText, calibration_text
from spade_lens.lenses.linear import AffineMaps
from spade_lens.lenses.saving import load_lens

D = 32


@pytest.fixture(scope="module")
def text() -> CalibrationText:
    """Forty pieces of forty documents, written by the tiny model."""
    return calibration_text(load(tiny("llama")), n_pieces=40, n_tokens=32)


def gathered(model: Model, text: CalibrationText, part: str, **kwargs: Any) -> Rows:
    """All rows of a part at once."""
    split = split_places(text, "all", held_out=0.1, seed=0)
    return rows_at(model, getattr(split, part), [0, 1, 2, 3], Spade(model, **kwargs))


def sums(x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments.none(x.shape[0], x.shape[2], x.device)
    moments.add(x, y)
    return moments


def rows_of(x: torch.Tensor, y: torch.Tensor) -> Rows:
    return Rows(x, y[0], y)


def dense(maps: AffineMaps) -> torch.Tensor:
    return maps.up if maps.down is None else maps.up @ maps.down


# -- the closed form


def test_without_a_ridge_it_is_least_squares_on_the_gathered_rows(
    tiny_llama: Model, text: CalibrationText
) -> None:
    lens = fit("l-spade", tiny_llama, text, per_piece="all", ridges=[0.0])
    rows = gathered(tiny_llama, text, "train")
    ones = torch.ones(len(rows.model), 1, dtype=torch.double)
    for layer in range(4):
        x, y = rows.start[layer].double(), rows.target[layer].double()
        solution = torch.linalg.lstsq(torch.cat([x, ones], 1), y, driver="gelsd").solution
        matrix = solution[:-1].T - torch.eye(D)
        torch.testing.assert_close(lens.maps.up[layer].double(), matrix, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            lens.maps.bias[layer].double(), solution[-1], atol=1e-3, rtol=1e-4
        )


@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_with_a_ridge_it_is_least_squares_with_rows_for_the_ridge(ridge: float) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 5, generator=draws).double() * torch.tensor([1, 10, 100, 1e3, 0.1])
    x = x + torch.tensor([0, 5, -50, 1e4, 1])
    y = torch.randn(1, 200, 5, generator=draws).double() + 3
    up, bias, _ = spectra(sums(x, y))[0].solve(ridge, None)
    # The textbook's way: standard units, and one further row per coordinate.
    mean, scale = x[0].mean(0), x[0].std(0, correction=0)
    units = (x[0] - mean) / scale
    added = y[0] - x[0]
    rows = torch.cat([units, (200 * ridge) ** 0.5 * torch.eye(5, dtype=torch.double)])
    goals = torch.cat([added - added.mean(0), torch.zeros(5, 5, dtype=torch.double)])
    matrix = (torch.linalg.lstsq(rows, goals).solution / scale[:, None]).T
    torch.testing.assert_close(up, matrix, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(bias, added.mean(0) - matrix @ mean, atol=1e-6, rtol=1e-6)


def test_an_enormous_ridge_leaves_the_identity() -> None:
    x = torch.randn(1, 100, 4)
    up, bias, _ = spectra(sums(x, x + torch.randn(1, 100, 4)))[0].solve(1e12, None)
    assert up.abs().max() < 1e-9 and bias.abs().max() < 1


def test_a_coordinate_that_never_changes_does_no_harm() -> None:
    x, y = torch.randn(1, 100, 4), torch.randn(1, 100, 4)
    x[..., 2] = 7.0
    for ridge in (0.0, 1e-3):
        up, bias, _ = spectra(sums(x, y))[0].solve(ridge, None)
        assert up.isfinite().all() and bias.isfinite().all() and up.abs().max() < 10


def test_streaming_is_batch() -> None:
    x, y = torch.randn(3, 100, 6) + 1000, torch.randn(3, 100, 6)
    whole, streamed = sums(x, y), Moments.none(3, 6, x.device)
    for some in torch.arange(100).split(7):
        streamed.add(x[:, some], y[:, some])
    for one, other in zip(spectra(whole), spectra(streamed), strict=True):
        for ridge in (0.0, 0.1):
            a, b = one.solve(ridge, None), other.solve(ridge, None)
            torch.testing.assert_close(a[0], b[0], atol=1e-8, rtol=1e-8)


def test_batches_of_any_size_give_the_same_lens(
    tiny_llama: Model, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit("l-spade", tiny_llama, text)
    monkeypatch.setattr("spade_lens.lenses.fitting.rows._BATCH_ROWS", 40)
    monkeypatch.setattr("spade_lens.settings._BATCH_TOKENS", 20)
    small = fit("l-spade", tiny_llama, text)
    assert whole.about["ridge"] == small.about["ridge"]
    torch.testing.assert_close(whole.maps.up, small.maps.up, atol=1e-4, rtol=1e-3)


def test_the_ridge_chosen_is_the_one_that_errs_least() -> None:
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 8, generator=draws)

    def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(1, n, 8, generator=draws)
        return x, x @ matrix + 20 * torch.randn(1, n, 8, generator=draws)

    problem = spectra(sums(*rows(12)))
    x, y = rows(500)
    ridges = [1e-4, 1e-2, 1.0, 1e2]
    errors = []
    for ridge in ridges:
        maps, _ = ridge_maps(problem, [0], SpadePlan(ridges=[ridge]), rows_of(x, y))
        errors.append(float((maps(x[0], 0) - y[0]).square().mean()))
    _, chosen = ridge_maps(problem, [0], SpadePlan(ridges=ridges), rows_of(x, y))
    assert chosen == [ridges[errors.index(min(errors))]] and chosen != [1e-4]


# -- low rank


def test_full_rank_is_no_restriction(tiny_llama: Model, text: CalibrationText) -> None:
    whole = fit("l-spade", tiny_llama, text)
    factored = fit("l-spade", tiny_llama, text, rank=D)
    assert factored.maps.rank == D and whole.maps.rank is None
    torch.testing.assert_close(dense(factored.maps), whole.maps.up, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(factored.maps.bias, whole.maps.bias, atol=1e-4, rtol=1e-3)


def test_of_all_maps_of_its_rank_none_errs_less_on_what_it_was_fitted_to() -> None:
    x = torch.randn(1, 300, 6).double()
    y = x + x @ torch.randn(6, 6).double() + torch.randn(1, 300, 6).double()
    problem = spectra(sums(x, y))[0]

    def error(up: torch.Tensor, bias: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (x[0] + x[0] @ down.T @ up.T + bias - y[0]).square().mean()

    last = None
    for rank in range(1, 7):
        up, bias, down = problem.solve(0.0, rank)
        assert down is not None and down.shape == (rank, 6)
        here = error(up, bias, down)
        # Descent from there finds nothing better, and more rank does.
        free = [t.clone().requires_grad_() for t in (up, bias, down)]
        slopes = torch.autograd.grad(error(*free), free)
        assert all(slope.abs().max() < 1e-8 for slope in slopes)
        assert last is None or here < last
        last = here


# -- what is fitted, and to what


def test_it_reads_more_like_spade_than_the_logit_lens_does(
    tiny_llama: Model, text: CalibrationText
) -> None:
    lens = fit("l-spade", tiny_llama, text, per_piece="all")
    kl = lens.held_out.pivot(index="layer", columns="lens", values="kl_to_spade")
    assert (kl["L-SPADE"] < kl["logit lens"]).all() and (kl["SPADE"] == 0).all()


def test_held_out_figures_are_those_of_read(tiny_llama: Model, text: CalibrationText) -> None:
    lens = fit("l-spade", tiny_llama, text, layers=[1, 3])
    test = split_places(text, 32, held_out=0.1, seed=0).test
    prompts = [
        Prompt(tokens=piece.tokens[: p + 1])
        for piece, some in zip(test.pieces, test.positions, strict=True)
        for p in some
    ]
    readout = read(prompts, [lens, LogitLens(tiny_llama), Spade(tiny_llama)], layers=[1, 3])
    expected = readout.to_frame().groupby(["layer", "lens"])[["kl", "agrees"]].mean()
    figures = lens.held_out.set_index(["layer", "lens"])
    assert figures["n"].unique().tolist() == [len(prompts)]
    for (layer, name), row in figures.iterrows():
        assert row["kl_to_model"] == pytest.approx(expected.loc[(layer, name), "kl"], abs=1e-4)
        assert row["agrees_with_model"] == pytest.approx(expected.loc[(layer, name), "agrees"])


@pytest.mark.parametrize(
    "spade", [{"positions": "reset"}, {"keep": Keep(start=False)}, {"keep": Keep(last=3)}]
)
def test_spades_arguments_are_passed_on(
    tiny_llama: Model, text: CalibrationText, spade: dict[str, Any]
) -> None:
    lens = fit("l-spade", tiny_llama, text, per_piece="all", ridges=[0.0], layers=[2], **spade)
    rows = gathered(tiny_llama, text, "train", **spade)
    error = (lens.at(rows.start[2], 2) - rows.target[2]).double()
    # Least squares leaves nothing that the rows could still explain.
    left = rows.start[2].double().T @ error / len(error)
    assert left.abs().max() < 1e-3 and error.mean(0).abs().max() < 1e-3
    assert lens.name == Spade(tiny_llama, **spade).name.replace("SPADE", "L-SPADE")


def test_answer_positions_of_prompts(tiny_llama: Model) -> None:
    prompts = [Prompt(tokens=(1, *range(3 + i, 9 + i)), answer=4) for i in range(60)]
    lens = fit("l-spade", tiny_llama, prompts, per_piece="answer", layers=[2])
    assert lens.about["positions"] == {"train": 48, "validation": 6, "test": 6}


def test_the_tuned_lens_gets_closer_to_the_model(tiny_llama: Model, text: CalibrationText) -> None:
    lens = fit("tuned", tiny_llama, text, per_piece="all", passes=3, rate=0.1)
    kl = lens.held_out.pivot(index="layer", columns="lens", values="kl_to_model")
    assert (kl["tuned lens"] < 0.8 * kl["logit lens"]).all()
    assert lens.about["left_at_identity"] == []


def test_a_descent_that_does_not_help_is_undone(tiny_llama: Model, text: CalibrationText) -> None:
    before = fit("l-spade", tiny_llama, text).maps
    tensors = {name: tensor.clone() for name, tensor in before.tensors.items()}
    tensors["up"][2] = torch.randn(D, D)
    tensors["bias"][0] += 1e-9
    after = AffineMaps(before.layers, **tensors)
    maps, left = better_of(tiny_llama, before, after, gathered(tiny_llama, text, "validation"))
    # Whether a change of 1e-9 helps or not is a matter of rounding.
    assert 2 in left and set(left) <= {0, 2}
    kept = before if 0 in left else after
    assert torch.equal(maps.up, before.up) and torch.equal(maps.bias, kept.bias)


@pytest.mark.parametrize("rank", [None, 4])
def test_refining_gets_closer_to_spade(
    tiny_llama: Model, text: CalibrationText, rank: int | None
) -> None:
    fits = [
        fit("l-spade", tiny_llama, text, rank=rank, passes=passes, rate=0.1, per_piece="all")
        for passes in (0, 3)
    ]
    before, after = (
        lens.held_out.query("lens == 'L-SPADE'").set_index("layer")["kl_to_spade"] for lens in fits
    )
    assert after.mean() < before.mean() and fits[1].maps.rank == rank


def test_nothing_in_the_model_is_changed(text: CalibrationText) -> None:
    hf_model = tiny("llama")
    before = {name: p.clone() for name, p in hf_model.named_parameters()}
    fit("l-spade", load(hf_model), text, passes=1)
    for name, parameter in hf_model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


# -- documents


def test_no_document_is_on_two_sides() -> None:
    pieces = tuple(Prompt(tokens=(1, *range(3, 13), 20 + i)) for i in range(60))
    text = CalibrationText(pieces, tuple(i // 4 for i in range(60)))
    split = split_places(text, "all", held_out=0.1, seed=0)
    parts = (split.train, split.validation, split.test)
    sides = [{p.tokens[-1] - 20 for p in part.pieces} for part in parts]
    assert set.union(*sides) == set(range(60)) and sum(map(len, sides)) == 60
    documents = [{i // 4 for i in side} for side in sides]
    assert not documents[0] & documents[1] and not documents[1] & documents[2]
    assert not documents[0] & documents[2] and split.by == "document"
    other = split_places(text, "all", held_out=0.1, seed=1)
    assert other.test.pieces != split.test.pieces
    assert all(0 not in some for some in split.train.positions)


def test_one_document_is_split_into_parts() -> None:
    pieces = tuple(Prompt(tokens=(1, 3, 4, i)) for i in range(20))
    split = split_places(CalibrationText(pieces, (0,) * 20), 2, held_out=0.1, seed=0)
    last = [p.tokens[-1] for part in (split.validation, split.test) for p in part.pieces]
    assert last == [16, 17, 18, 19] and split.by == "part of one document"


def test_held_out_rows_do_not_grow_with_the_text() -> None:
    pieces = tuple(Prompt(tokens=tuple(range(100))) for _ in range(300))
    split = split_places(CalibrationText(pieces, tuple(range(300))), "all", held_out=0.2, seed=0)
    assert len(split.test) == len(split.validation) == 1024
    assert len(split.train) == 99 * (300 - 2 * 11)


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [5]}, "layers 0 .the embedding. to 4"),
        ({"layers": [4]}, "Only layer 4 was asked for, where a lens is the model"),
        ({"rank": 0}, "rank=0 was given; expected at least 1"),
        ({"rank": 33}, "rank=33 was given; expected 1 to 32"),
        ({"ridges": []}, "numbers of at least 0"),
        ({"ridges": [-1.0]}, "numbers of at least 0"),
        ({"ridges": [float("nan")]}, "numbers of at least 0"),
        ({"passes": -1}, "passes=-1"),
        ({"passes": 1, "rate": 0.0}, "a rate above 0"),
        ({"held_out": 0.5}, "held_out=0.5"),
        ({"per_piece": 0}, "per_piece=0 was given"),
        ({"keep": Keep(last=0, positions=(1,))}, "A linear lens starts at the answer token"),
        ({"keep": Keep(spans=("labels",))}, "this prompt has"),
    ],
)
def test_bad_arguments(
    tiny_llama: Model, text: CalibrationText, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit("l-spade", tiny_llama, text, **arguments)


def test_a_kind_an_option_or_a_plan_that_does_not_exist(
    tiny_llama: Model, text: CalibrationText
) -> None:
    with pytest.raises(ValueError, match="no fit of kind 'linear'; expected l-spade or tuned"):
        fit("linear", tiny_llama, text)
    with pytest.raises(TypeError, match=r"Options \['rnk'\] .*'rank'.* for a SpadePlan"):
        fit("l-spade", tiny_llama, text, rnk=3)
    with pytest.raises(TypeError, match=r"Options \['rank'\] were given"):
        fit("tuned", tiny_llama, text, rank=3)
    with pytest.raises(ValueError, match="passes=0 .* at least 1 passes"):
        fit("tuned", tiny_llama, text, passes=0)


def test_a_start_token_by_name_where_the_tokenizer_has_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    model = load(tiny("llama"), tokenizer=tokenizer)
    sizes = {"n_pieces": 20, "n_tokens": 16, "layers": 2}
    with pytest.raises(ValueError, match="bos="):
        fit("l-spade", model, **sizes)
    assert fit("l-spade", model, **sizes, bos="</s>").about["text"]["pieces"] == 20


def test_a_plan_is_its_options(tiny_llama: Model, text: CalibrationText) -> None:
    plan = SpadePlan(layers=[2], ridges=[0.1])
    lenses = [
        fit(plan, tiny_llama, text),
        fit(SpadePlan(layers=2), tiny_llama, text, ridges=[0.1]),
        spade_lens.fit("l-spade", tiny_llama, text, layers=[2], ridges=[0.1]),
    ]
    for lens in lenses:
        assert torch.equal(lens.maps.up, lenses[0].maps.up) and lens.layers == (2, 4)


def test_too_little_text(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match="gives 12 positions .*at least 33 are needed"):
        fit("l-spade", tiny_llama, ["abc", "def", "ghi", "jkl", "mno", "pqr"])
    with pytest.raises(ValueError, match="has 2 pieces; at least 3 are needed"):
        fit("tuned", tiny_llama, ["abc", "def"])
    with pytest.raises(ValueError, match="There is no text"):
        fit("tuned", tiny_llama, [""])
    alone = [Prompt(tokens=(1,))] * 50
    with pytest.raises(ValueError, match="Piece 0 of the text has nothing to learn from"):
        fit("tuned", tiny_llama, alone)


def test_a_model_that_gives_nan(text: CalibrationText) -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    hf_model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite at layer"):
        fit("l-spade", model, text, layers=[1])


@pytest.mark.download
@pytest.mark.slow
def test_on_the_real_model_both_read_better_than_the_logit_lens(
    smollm2: Model, tmp_path: Path
) -> None:
    text = calibration_text(smollm2, n_pieces=40, n_tokens=64)
    arguments = {"per_piece": 24, "layers": [15, 24]}
    linear = fit("l-spade", smollm2, text, **arguments)
    tuned = fit("tuned", smollm2, text, **arguments)
    print(linear.held_out.round(3).to_string(), linear.about["ridge"], linear.about["seconds"])
    print(tuned.held_out.round(3).to_string(), tuned.about["seconds"])
    # So little text takes the tuned lens only a part of the way.
    for lens, column, share in ((linear, "kl_to_spade", 0.5), (tuned, "kl_to_model", 1.0)):
        kl = lens.held_out.pivot(index="layer", columns="lens", values=column)
        assert (kl[lens.name] < share * kl["logit lens"]).all()
        back = load_lens(lens.save(tmp_path / lens.name), smollm2)
        assert torch.equal(back.maps.up, lens.maps.up)
