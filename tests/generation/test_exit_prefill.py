"""An exit from the prompt goes on exactly as the definition says: at a layer, and by a rule."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting import PROMPTS
from tiny import ARCHITECTURES, tiny

import spade_lens as sl
from spade_lens.exits import (
    Confidence,
    FixedLayer,
    Policy,
    Screened,
    SpadeExit,
    Threshold,
    exit_tables,
    fit_gates,
    gate_features,
)
from spade_lens.generation import (
    ExitPrefill,
    Shortcuts,
    fit_shortcuts,
    load_shortcuts,
    score_answers,
    score_text,
)
from spade_lens.models.backbone import KeyValueCache
from spade_lens.models.projections import projections_of
from spade_lens.prompts import Prompt

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def shortcuts(tiny_llama: sl.Model) -> Shortcuts:
    torch.manual_seed(0)
    text = [Prompt(tokens=tuple(torch.randint(3, 60, (20,)).tolist())) for _ in range(40)]
    return fit_shortcuts(tiny_llama, 2, text)


def test_an_exit_at_the_top_is_plain(tiny_llama: sl.Model) -> None:
    plain = sl.generate(PROMPTS, 10, model=tiny_llama, stop=())
    at_top = ExitPrefill(tiny_llama.n_layers)
    everything = ExitPrefill(2, keep=sl.Keep(last=100))
    for strategy in (at_top, everything):
        written = sl.generate(PROMPTS, 10, model=tiny_llama, stop=(), strategy=strategy)
        assert written.tokens == plain.tokens
        torch.testing.assert_close(written.logprob, plain.logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keep", [sl.Keep(), sl.Keep(last=4), sl.Keep(start=False)])
@pytest.mark.parametrize("layer", [1, 3])
def test_an_exit_goes_on_as_the_definition_says(
    tiny_llama: sl.Model, layer: int, keep: sl.Keep
) -> None:
    strategy = ExitPrefill(layer, keep=keep)
    written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), strategy=strategy)
    for prompt, tokens, logprob in zip(
        PROMPTS, written.tokens, written.logprob.split(6), strict=True
    ):
        n = len(prompt)
        whole = torch.tensor([[*prompt.tokens, *tokens[:-1]]])
        kept = sorted({*keep(prompt, n - 1), *range(n - 1, whole.shape[1])})
        positions = torch.arange(whole.shape[1])[None]
        with torch.no_grad():
            low = tiny_llama.run_blocks(tiny_llama.embed(whole), positions, 0, layer)
            high = tiny_llama.run_blocks(
                low[:, kept], positions[:, kept], layer, tiny_llama.n_layers
            )
            logits = tiny_llama.logits(high[0, -len(tokens) :])
        assert tuple(logits.argmax(-1).tolist()) == tokens
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(logprob, expected, atol=1e-4, rtol=0)
    scores = score_text(PROMPTS, written.tokens, model=tiny_llama, strategy=strategy)
    assert scores["greedy"].all()
    assert scores["logprob"].sum() == pytest.approx(float(written.logprob.sum()), abs=1e-3)


@pytest.mark.parametrize("keep", [sl.Keep(), sl.Keep(last=4), sl.Keep(start=False)])
def test_shortcuts_give_the_rest_keys_and_values(
    tiny_llama: sl.Model, shortcuts: Shortcuts, keep: sl.Keep
) -> None:
    """As if the blocks above had fitted projections for the rest, on its residual at the exit."""
    strategy = ExitPrefill(2, keep=keep, shortcuts=shortcuts)
    written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), strategy=strategy)
    dropped = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), strategy=ExitPrefill(2, keep))
    assert not torch.allclose(written.logprob, dropped.logprob, atol=1e-3)
    other = copy.deepcopy(tiny_llama.original)  # with the fitted projections for its own
    of_other = sl.load(other, tokenizer=tiny_llama.tokenizer)
    for name, tensor in shortcuts.tensors.items():
        block, path = name.split(".", 1)
        projection = other.model.layers[int(block)].get_submodule(path.rpartition(".")[0])
        setattr(projection, path.rpartition(".")[2], torch.nn.Parameter(tensor))
    for prompt, tokens, logprob in zip(
        PROMPTS, written.tokens, written.logprob.split(6), strict=True
    ):
        n = len(prompt)
        whole = torch.tensor([[*prompt.tokens, *tokens[:-1]]])
        rest = sorted(set(range(n - 1)) - {*keep(prompt, n - 1)})
        kept = sorted(set(range(whole.shape[1])) - set(rest))
        positions = torch.arange(whole.shape[1])[None]
        with torch.no_grad():
            low = tiny_llama.run_blocks(tiny_llama.embed(whole), positions, 0, 2)
            cached = of_other.cached_tokens(positions[:, rest], lambda _, x=low[:, rest]: x)
            high = tiny_llama.run_blocks(
                *(low[:, kept], positions[:, kept], 2, tiny_llama.n_layers),
                cache=KeyValueCache(cached) if rest else None,
            )
            logits = tiny_llama.logits(high[0, -len(tokens) :])
        assert tuple(logits.argmax(-1).tolist()) == tokens
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(logprob, expected, atol=1e-4, rtol=0)


def test_shortcuts_change_nothing_where_all_is_kept(
    tiny_llama: sl.Model, shortcuts: Shortcuts
) -> None:
    plain = sl.generate(PROMPTS, 10, model=tiny_llama, stop=())
    everything = ExitPrefill(2, keep=sl.Keep(last=100), shortcuts=shortcuts)
    written = sl.generate(PROMPTS, 10, model=tiny_llama, stop=(), strategy=everything)
    assert written.tokens == plain.tokens
    torch.testing.assert_close(written.logprob, plain.logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_first_block_above_an_exit_needs_no_fit(name: str) -> None:
    """Blocks that make keys and values alone make those of the whole block, in any architecture."""
    model = sl.load(tiny(name))
    decoder = model.decoder()
    if decoder is None:
        return
    found = {block: projections_of(decoder, block) for block in range(model.n_layers)}
    resid, positions = torch.randn(2, 5, model.d_model), torch.arange(5)[None].expand(2, 5)

    def alone(block: int, module: torch.nn.Module) -> torch.nn.Module:
        projections = found[block]
        return module if projections is None else projections.alone(module)

    with torch.no_grad():
        whole = decoder.cached_tokens(positions, lambda _: resid)
        part = decoder.having_blocks(alone).cached_tokens(positions, lambda _: resid)  # type: ignore[union-attr]
        for block, projections in found.items():
            assert projections is not None and 0 < len(projections.needed) < 3
            for a, b in zip(whole.keys_values(block), part.keys_values(block), strict=True):  # type: ignore[union-attr]
                torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_shortcuts_are_the_least_squares(tiny_llama: sl.Model, shortcuts: Shortcuts) -> None:
    held_out = shortcuts.held_out
    assert held_out["block"].tolist() == [3]
    assert (held_out["shortcut_error"] < held_out["copied_error"]).all()


def test_shortcuts_are_the_models_own_where_residuals_do_not_change(tiny_llama: sl.Model) -> None:
    """If the blocks between add nothing, the fit finds the projections that are there."""
    still = copy.deepcopy(tiny_llama.original)
    for name, weight in still.model.layers[2].named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(weight)
    model = sl.load(still, tokenizer=tiny_llama.tokenizer)
    torch.manual_seed(0)
    text = [Prompt(tokens=tuple(torch.randint(3, 60, (20,)).tolist())) for _ in range(40)]
    fitted = fit_shortcuts(model, 2, text)
    assert (fitted.held_out["shortcut_error"] < 1e-4).all()
    assert (fitted.held_out["copied_error"] < 1e-9).all()


def test_shortcuts_are_saved_with_their_model(
    tiny_llama: sl.Model, shortcuts: Shortcuts, tmp_path: Path
) -> None:
    again = load_shortcuts(shortcuts.save(tmp_path / "two"), tiny_llama)
    assert again.about == shortcuts.about and again.layer == 2
    assert set(again.tensors) == set(shortcuts.tensors)
    for name, tensor in shortcuts.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)
    other = sl.load(tiny("mistral"))
    with pytest.raises(ValueError, match="belongs to"):
        load_shortcuts(tmp_path / "two", other)
    with pytest.raises(ValueError, match="belongs to"):
        sl.generate(PROMPTS, 2, model=other, strategy=ExitPrefill(2, shortcuts=shortcuts))
    fewer = dict(shortcuts.tensors)
    del fewer[sorted(fewer)[0]]
    with pytest.raises(ValueError, match="differ in"):
        Shortcuts(tiny_llama, 2, fewer, {})
    narrow = {name: tensor[..., :3] for name, tensor in shortcuts.tensors.items()}
    with pytest.raises(ValueError, match="expected a width of 32"):
        Shortcuts(tiny_llama, 2, narrow, {})


def test_shortcuts_belong_to_the_model_they_were_fitted_on(tmp_path: Path) -> None:
    """Also where it has changed before they are saved."""
    model = sl.load(tiny("llama"))
    text = [Prompt(tokens=tuple(range(3 + n, 23 + n))) for n in range(40)]
    fitted = fit_shortcuts(model, 2, text)
    fitted.save(tmp_path / "before")
    with torch.no_grad():
        model.original.model.layers[3].mlp.down_proj.weight += 0.01
    fitted.save(tmp_path / "after")
    for name in ("before", "after"):
        with pytest.raises(ValueError, match="belongs to"):
            load_shortcuts(tmp_path / name, model)


def test_a_keep_rule_may_name_a_token_twice(tiny_llama: sl.Model) -> None:
    strategy = ExitPrefill(2, keep=lambda prompt, last: [0, last])
    one = sl.Prompt((5,))
    written = sl.generate(one, 3, model=tiny_llama, stop=(), strategy=strategy)
    assert written.tokens == sl.generate(one, 3, model=tiny_llama, stop=()).tokens


def test_shortcuts_that_do_not_fit_are_refused(tiny_llama: sl.Model, shortcuts: Shortcuts) -> None:
    with pytest.raises(ValueError, match=r"start at \[2\]"):
        ExitPrefill(1, shortcuts=shortcuts)
    with pytest.raises(TypeError, match="shortcuts"):
        ExitPrefill(1, shortcuts="two")  # type: ignore[arg-type]
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"layer={layer}"):
            fit_shortcuts(tiny_llama, layer, ["ab"])
    with pytest.raises(ValueError, match="Give more text"):
        fit_shortcuts(tiny_llama, 2, ["abc", "cde", "efg"])
    hook = tiny_llama.original.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(sl.UnsupportedModelError, match="Leave the hooks"):
        fit_shortcuts(tiny_llama, 2, ["abc", "cde", "efg"])
    hook.remove()


def test_the_first_token_after_an_exit_is_spades(tiny_llama: sl.Model) -> None:
    spade = sl.Spade(tiny_llama)
    readout = sl.read(PROMPTS, spade, model=tiny_llama, layers=[2]).to_frame()
    written = sl.generate(PROMPTS, 1, model=tiny_llama, stop=(), strategy=ExitPrefill(2))
    assert readout["top_1_id"].tolist() == written.token.tolist()


# -- by a rule


@pytest.fixture(scope="module")
def rule(tiny_llama: sl.Model) -> SpadeExit:
    """Which of the prompts leaves where differs: at layers 1, 2 and 3, and at the top."""
    [table] = exit_tables(tiny_llama, PROMPTS, "logit", layers=LAYERS)
    surest = table.confidence.topk(2, dim=1).values.mean(dim=1)  # at every layer one prompt leaves
    policy = Threshold(dict(zip(LAYERS, surest.tolist(), strict=True)))
    return SpadeExit(tiny_llama, "logit", policy, layers=LAYERS)


def fixed(layer: int, model: sl.Model, **more: Any) -> ExitPrefill | None:
    return None if layer == model.n_layers else ExitPrefill(layer, **more)


@pytest.mark.parametrize("keep", [None, sl.Keep(last=4)])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_rule_decides_for_every_prompt(
    tiny_llama: sl.Model, rule: SpadeExit, keep: sl.Keep | None, mapped: bool
) -> None:
    """Together and one by one: as an exit at the layer where the engine lets the prompt leave."""
    text = [Prompt(tokens=tuple(range(3 + n, 23 + n))) for n in range(40)]
    shortcuts = [fit_shortcuts(tiny_llama, layer, text) for layer in LAYERS if mapped and layer < 3]
    strategy = ExitPrefill(rule, keep, shortcuts or None)
    written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), strategy=strategy)
    assert written.prompt_exit_layer is not None
    layers = written.prompt_exit_layer.tolist()
    assert layers == rule.run(PROMPTS).exit_layer.tolist()
    assert len(set(layers)) >= 3
    assert written.to_frame()["prompt_exit_layer"].tolist() == [
        at for at in layers for _ in range(6)
    ]
    scores = score_text(PROMPTS, written.tokens, model=tiny_llama, strategy=strategy)
    assert scores["greedy"].all()
    answers = [
        Prompt(p.tokens, target=tokens[0], target_tokens=tokens[:3])
        for p, tokens in zip(PROMPTS, written.tokens, strict=True)
    ]
    whole = score_answers(answers, model=tiny_llama, strategy=strategy, stop=())
    each = [tokens[:3] for tokens in written.tokens]
    alone = score_text(PROMPTS, each, model=tiny_llama, strategy=strategy)
    assert whole["logprob"].tolist() == pytest.approx(alone["logprob"].tolist(), abs=1e-4)
    by_layer = {one.layer: one for one in shortcuts}
    each = zip(PROMPTS, layers, written.tokens, written.logprob.split(6), strict=True)
    for n, (prompt, layer, tokens, logprob) in enumerate(each):
        at = fixed(layer, tiny_llama, keep=keep, shortcuts=by_layer.get(layer))
        if mapped and layer == 3:  # the last block needs no shortcut, and nothing else is kept
            at = ExitPrefill(3, keep=sl.Keep(last=100))
        for other in (strategy, at):
            alone = sl.generate(prompt, 6, model=tiny_llama, stop=(), strategy=other)
            assert alone.tokens[0] == tokens
            torch.testing.assert_close(alone.logprob, logprob, atol=1e-4, rtol=0)
        assert scores["logprob"][n] == pytest.approx(float(logprob.sum()), abs=1e-3)


def test_a_calibrated_rule_and_its_keep_set(tiny_llama: sl.Model, tmp_path: Path) -> None:
    keep = sl.Keep(last=3)
    prompts = [Prompt(p.tokens, candidates=(5, 6), target=5) for p in PROMPTS] * 10
    calibration = sl.calibrate(
        tiny_llama, prompts, checks=["own"], keep=keep, layers=[1, 2], families=["fixed layer"]
    )
    best = calibration.best(1.0)
    strategy = ExitPrefill(best)
    assert strategy.kept == keep
    at = best.policy.stops((1, 2))[0]
    written = sl.generate(PROMPTS, 5, model=tiny_llama, stop=(), strategy=strategy)
    same = sl.generate(PROMPTS, 5, model=tiny_llama, stop=(), strategy=ExitPrefill(at, keep))
    assert written.tokens == same.tokens
    assert written.prompt_exit_layer is not None
    assert written.prompt_exit_layer.tolist() == [at] * len(PROMPTS)
    written.save(tmp_path)
    again = type(written).load(tmp_path).prompt_exit_layer
    assert again is not None and again.tolist() == [at] * len(PROMPTS)


@pytest.mark.parametrize("kind", ["gates", "cascade"])
def test_gates_and_cascades_decide_as_in_the_engine(tiny_llama: sl.Model, kind: str) -> None:
    lens = sl.lenses.LogitLens(tiny_llama)
    texts = [Prompt((1, 3 + n, *range(5, 8 + n % 9))) for n in range(50)]
    texts, others = texts[::2], texts[1::2]
    check = Confidence(lens, features=gate_features)
    if kind == "cascade":
        check = Confidence(sl.Spade(tiny_llama), after=Confidence(lens))
    tables = exit_tables(tiny_llama, others, check, layers=LAYERS)
    policy: Policy
    if kind == "gates":
        gates = fit_gates(tables, "jei", loss="disagrees", costs=[1.0])
        [policy, *_] = gates(exit_tables(tiny_llama, texts, check, layers=LAYERS)[0])
    else:
        assert tables[0].screen is not None
        policy = Screened(Threshold(0.0), least=float(tables[0].screen[0].median()))
    engine = SpadeExit(tiny_llama, check, policy, layers=LAYERS)
    strategy = ExitPrefill(engine)
    written = sl.generate(texts, 2, model=tiny_llama, stop=(), strategy=strategy)
    assert written.prompt_exit_layer is not None
    assert written.prompt_exit_layer.tolist() == engine.run(texts).exit_layer.tolist()
    assert (written.prompt_exit_layer < tiny_llama.n_layers).any()


def test_a_rule_acts_beside_patches(tiny_llama: sl.Model, rule: SpadeExit) -> None:
    """The check sees the patched prompt, as the blocks do."""
    push = sl.Patch(1, positions="prompt", values=torch.full((32,), 3.0), mode="add")
    strategy = ExitPrefill(rule)
    given = dict(model=tiny_llama, stop=(), strategy=strategy, patches=[push])
    together = sl.generate(PROMPTS, 4, **given)
    alone = [sl.generate(p, 4, **given) for p in PROMPTS]
    assert together.tokens == tuple(one.tokens[0] for one in alone)
    assert together.prompt_exit_layer is not None
    assert together.prompt_exit_layer.tolist() == [int(one.prompt_exit_layer) for one in alone]


def test_prompts_that_keep_unequal_numbers_of_tokens_have_room(
    tiny_llama: sl.Model, shortcuts: Shortcuts
) -> None:
    prompts = [Prompt(tuple(range(3, 43))), Prompt(tuple(range(13, 53)))]

    def all_or_two(prompt: Prompt, last: int) -> list[int]:
        return list(range(last + 1)) if prompt.tokens[0] == 3 else [0, last]

    strategy = ExitPrefill(2, all_or_two, shortcuts)
    together = sl.generate(prompts, 3, model=tiny_llama, stop=(), strategy=strategy)
    alone = [sl.generate(p, 3, model=tiny_llama, stop=(), strategy=strategy) for p in prompts]
    assert together.tokens == tuple(one.tokens[0] for one in alone)


def test_a_rule_over_candidates_is_refused_for_text(tiny_llama: sl.Model) -> None:
    prompts = [Prompt(p.tokens, candidates=(5, 6), target=5) for p in PROMPTS] * 5
    given: dict = dict(keep=sl.Keep(last=3), layers=[1, 2], families=["threshold"])
    chosen = sl.calibrate(tiny_llama, prompts, checks=["logit"], **given).best(1.0)
    assert chosen.among == "candidates"
    with pytest.raises(ValueError, match="over the candidates.*prompt 0 .* over the vocabulary"):
        sl.generate(PROMPTS, 2, model=tiny_llama, strategy=ExitPrefill(chosen))
    with pytest.raises(ValueError, match="prompt 0 .* over the vocabulary"):
        sl.generate(PROMPTS, 2, model=tiny_llama, strategy=ExitPrefill(chosen.engine()))
    with pytest.raises(ValueError, match="prompt 0 .* over the vocabulary"):
        chosen.engine().run(PROMPTS)
    sl.generate(prompts[:2], 2, model=tiny_llama, strategy=ExitPrefill(chosen), stop=())
    check = Confidence(sl.lenses.LogitLens(tiny_llama), over="vocabulary")
    chosen = sl.calibrate(tiny_llama, prompts, checks=[check], **given).best(1.0)
    sl.generate(PROMPTS, 2, model=tiny_llama, strategy=ExitPrefill(chosen), stop=())


def test_a_rule_that_lets_nobody_leave_is_plain(tiny_llama: sl.Model) -> None:
    never = SpadeExit(tiny_llama, "logit", Threshold(2.0), layers=[2])
    plain = sl.generate(PROMPTS, 5, model=tiny_llama, stop=())
    written = sl.generate(PROMPTS, 5, model=tiny_llama, stop=(), strategy=ExitPrefill(never))
    assert written.tokens == plain.tokens
    assert written.prompt_exit_layer is not None
    assert set(written.prompt_exit_layer.tolist()) == {tiny_llama.n_layers}


def test_rules_that_do_not_fit_are_refused(
    tiny_llama: sl.Model, shortcuts: Shortcuts, rule: SpadeExit
) -> None:
    with pytest.raises(TypeError, match="layer"):
        ExitPrefill("two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"start at \[2\].*may leave at \[1, 2\]"):
        ExitPrefill(rule, shortcuts=shortcuts)
    by_lens = SpadeExit(tiny_llama, None, FixedLayer(2), answerer="logit", layers=[2])
    with pytest.raises(ValueError, match="keeps no tokens"):
        ExitPrefill(by_lens)
    ExitPrefill(by_lens, keep=sl.Keep())
    other = sl.load(tiny("mistral"))
    with pytest.raises(ValueError, match="belong to different models"):
        sl.generate(PROMPTS, 2, model=other, strategy=ExitPrefill(rule))
    among = Confidence(sl.lenses.LogitLens(tiny_llama), over="candidates")
    strategy = ExitPrefill(SpadeExit(tiny_llama, among, Threshold(0.5), layers=[2]))
    with pytest.raises(ValueError, match="candidates"):
        sl.generate(PROMPTS, 2, model=tiny_llama, strategy=strategy)
