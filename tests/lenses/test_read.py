"""The door of read(): whatever is at hand goes in, and each way in gives the same readings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny, tiny_tokenizer

from spade_lens import Keep, LogitLens, Model, Prompt, Readout, Settings, Spade, load, read
from spade_lens.lenses import Reading
from spade_lens.lenses.named import NAMED
from spade_lens.stats import summarise

EXACT = {"atol": 1e-4, "rtol": 0.0}
CHAT = [{"role": "user", "content": "ab"}]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@pytest.fixture
def chatty() -> Model:
    """A model whose tokenizer has a chat template, which does not write the start token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return load(tiny("llama"), tokenizer=tokenizer, name="chatty")


def same(one: Readout, other: Readout) -> None:
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), atol=1e-4)


def test_text_and_prompts_are_the_same(tiny_llama: Model) -> None:
    prompts = [tiny_llama.prompt("ab"), tiny_llama.prompt("c->d")]
    whole = read(prompts, model=tiny_llama)
    same(read(["ab", "c->d"], model=tiny_llama), whole)
    same(read(["ab", prompts[1]], model=tiny_llama), whole)
    same(tiny_llama.read(("ab", "c->d")), whole)
    same(tiny_llama.read("ab"), read(prompts[0], ["logit", "spade"], model=tiny_llama))


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_a_chat_has_its_start_token_once(chatty: Model, start: str) -> None:
    chatty.tokenizer.chat_template = start + TEMPLATE
    text = chatty.prompt("u:ab;a:")
    assert text.tokens[0] == 1 and text.tokens.count(1) == 1
    [prompt] = chatty.prompts(CHAT)
    assert prompt.tokens == text.tokens
    same(chatty.read(CHAT), chatty.read(text))
    both = chatty.read([CHAT, "ab", CHAT])
    assert both.prompt.tolist() == [0, 1, 2]
    torch.testing.assert_close(both.entropy[:, :, 0], both.entropy[:, :, 2], **EXACT)


def test_a_chat_without_a_template_is_refused(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        tiny_llama.read(CHAT)


@pytest.mark.parametrize(
    ("lens", "names"),
    [
        ("logit", ["logit lens"]),
        (["spade"], ["SPADE"]),
        (("logit", Keep(last=2)), ["logit lens", "SPADE (start+last 2)"]),
    ],
)
def test_lenses_by_name_and_as_they_are(tiny_llama: Model, lens: Any, names: list[str]) -> None:
    if not isinstance(lens, str):
        lens = [Spade(tiny_llama, keep=one) if isinstance(one, Keep) else one for one in lens]
    assert list(read("ab", lens, model=tiny_llama).lenses) == names


def test_the_model_is_that_of_the_lenses(tiny_llama: Model) -> None:
    same(read("abc", LogitLens(tiny_llama)), read("abc", "logit", model=tiny_llama))
    same(read("abc", [LogitLens(tiny_llama), "spade"]), read("abc", model=tiny_llama))
    with pytest.raises(ValueError, match="No model was given"):
        read("abc")


def test_a_name_of_ones_own(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "pair", lambda model: Spade(model, keep=Keep(last=2), name="two"))
    assert tiny_llama.read("abc", "pair").lenses == ("two",)


def test_one_layer_or_several(tiny_llama: Model) -> None:
    assert tiny_llama.read("ab", layers=2).layers == (2,)
    assert tiny_llama.read("ab", layers=range(3, 0, -1)).layers == (3, 2, 1)
    assert tiny_llama.read("ab").layers == (0, 1, 2, 3, 4)


PROMPTS = [
    Prompt(tokens=(1, 8, 40, 7, 30), spans={"query": (1, 2)}),
    Prompt(tokens=(1, 60, 3), answer=1, target=9, spans={"query": (2,)}),
]


@pytest.mark.parametrize(
    ("positions", "places"),
    [
        (None, [(0, 4), (1, 1)]),
        ("last", [(0, 4), (1, 2)]),
        ("all", [*((0, p) for p in range(5)), *((1, p) for p in range(3))]),
        ("query", [(0, 1), (0, 2), (1, 2)]),
        (-2, [(0, 3), (1, 1)]),
        ([0, -1], [(0, 0), (0, 4), (1, 0), (1, 2)]),
        ([[1, 3], []], [(0, 1), (0, 3)]),
    ],
)
def test_positions_and_their_targets(
    tiny_llama: Model, positions: Any, places: list[tuple[int, int]]
) -> None:
    readout = read(PROMPTS, model=tiny_llama, positions=positions, top_k=2)
    pairs = list(zip(readout.prompt.tolist(), readout.position.tolist(), strict=True))
    assert pairs == places
    for n, (i, position) in enumerate(places):
        tokens = PROMPTS[i].tokens
        follows = tokens[position + 1] if position + 1 < len(tokens) else -1
        expected = 9 if (i, position) == (1, 1) else -1 if positions is None else follows
        assert int(readout.target[n]) == expected
        # Each place is what a prompt that ends there reads.
        alone = read(Prompt(tokens=tokens[: position + 1]), model=tiny_llama, top_k=2)
        for field in ("top_logprobs", "entropy", "kl"):
            torch.testing.assert_close(
                getattr(readout, field)[:, :, n], getattr(alone, field)[:, :, 0], **EXACT
            )


def test_batches_of_one_prompt_and_one_reading_are_the_same(tiny_llama: Model) -> None:
    texts = ["ab->AB,cd->", "q", "x->y"]
    whole = tiny_llama.read(texts, positions="all")
    same(tiny_llama.read(texts, positions="all", settings=Settings(batch_size=1)), whole)
    same(tiny_llama.read(texts, positions="all", settings=Settings(memory_limit=1e-4)), whole)
    for i, text in enumerate(texts):
        alone = tiny_llama.read(text, positions="all")
        part = whole.entropy[:, :, whole.prompt == i]
        torch.testing.assert_close(part, alone.entropy, **EXACT)


class Own:
    """A lens of a user's own, which gives what a test wants."""

    name = "mine"

    def __init__(self, model: Model, finals: Any = None, keep: Any = None) -> None:
        self.model, self.finals, self.kept = model, finals, keep

    def keep(self, prompt: Prompt, answer: int) -> Any:
        return (answer,) if self.kept is None else self.kept

    def final_residuals(self, residuals: Any, readings: list[Reading], layers: list[int]) -> Any:
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        stack = torch.stack([residuals.layer(layer)[slots] for layer in layers])
        return stack if self.finals is None else self.finals(stack)


def test_a_lens_of_ones_own(tiny_llama: Model) -> None:
    mine, logit = read("abc", Own(tiny_llama)), read("abc", "logit", model=tiny_llama)
    assert mine.lenses == ("mine",)
    torch.testing.assert_close(mine.kl, logit.kl)
    double = read("abc", Own(tiny_llama, lambda stack: stack.double()))
    torch.testing.assert_close(double.kl, logit.kl)
    few = Own(tiny_llama)
    few.layers = (2, 4)  # type: ignore[attr-defined]
    assert read("abc", [few, "spade"]).layers == (2, 4)
    none = Own(tiny_llama)
    none.name, none.layers = "other", (1,)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no layer that all of these lenses read"):
        read("abc", [few, none])


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"finals": lambda s: s[0]}, ValueError, r"'mine' gave \(1, 32\); expected .*\(5, 1, 32\)"),
        ({"finals": lambda s: s.tolist()}, TypeError, "'mine' gave list; expected a tensor"),
        ({"finals": lambda s: (s, s)}, TypeError, "'mine' gave tuple"),
        ({"keep": ()}, ValueError, r"'mine': \[\] was given; .* from 0 to 3"),
        ({"keep": (9,)}, ValueError, r"'mine': \[9\] was given, and \[9\] lie"),
        ({"keep": "ab"}, TypeError, "'mine': 'ab' was given"),
        ({"keep": 1.5}, TypeError, "'mine': 1.5 was given; expected"),
    ],
)
def test_what_it_returns_is_checked_and_it_is_named(
    tiny_llama: Model, own: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read("abc", Own(tiny_llama, **own))


def test_spade_can_be_pasted_back(tiny_llama: Model) -> None:
    names = {"Spade": Spade, "Keep": Keep, "model": tiny_llama, "LogitLens": LogitLens}
    for options in (
        {},
        {"keep": Keep(last=4)},
        {"keep": Keep(spans=("labels",)), "positions": "reset"},
        {"name": "mine"},
    ):
        lens = Spade(tiny_llama, **options)
        back = eval(repr(lens), names)
        assert (back.name, back.rule, back.positions) == (lens.name, lens.rule, lens.positions)
    assert repr(Spade(tiny_llama)) == "Spade(model)"
    assert isinstance(eval(repr(LogitLens(tiny_llama)), names), LogitLens)


# -- the result


def test_tokens_are_there_as_text_and_as_ids(tiny_llama: Model) -> None:
    prompts = [tiny_llama.prompt("ab->A", target="B", candidates=("B", "C")), PROMPTS[0]]
    readout = read(prompts, model=tiny_llama, top_k=2)
    frame = readout.to_frame()
    for name in ("top_1", "top_2", "target", "choice", "candidate_1", "candidate_2"):
        for text, token in zip(frame[name], frame[f"{name}_id"], strict=True):
            assert pd.isna(token) if pd.isna(text) else readout.words[token] == text
    with_target = frame[frame["prompt"] == 0]
    assert set(with_target["target_id"]) == {prompts[0].target}
    assert frame[frame["prompt"] == 1]["target_id"].isna().all()
    # Over the vocabulary, and among the candidates: two measures, both in a summary.
    prefers = with_target["choice_id"] == with_target["target_id"]
    assert with_target["prefers"].tolist() == prefers.tolist()
    assert frame[frame["prompt"] == 1]["prefers"].isna().all()
    assert {"accuracy", "preference"} <= set(summarise(readout)["measure"])


def test_words_such_as_na_survive_saving_and_a_csv(tiny_llama: Model, tmp_path: Path) -> None:
    readout = tiny_llama.read(["ab", "c"], positions="all", top_k=2)
    ids = readout.top_tokens[..., 0].flatten().tolist()
    readout.words[ids[0]], readout.words[ids[1]] = "NA", "null"
    back = Readout.load(readout.save(tmp_path / "readout"))
    assert back.words == readout.words
    for field, value in vars(readout).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(back, field), value, atol=0, rtol=0, equal_nan=True)
        else:
            assert getattr(back, field) == value
    pd.testing.assert_frame_equal(back.to_frame(), readout.to_frame())
    assert {"NA", "null"} <= set(back.to_frame()["top_1"])
    back.to_frame().to_csv(tmp_path / "readout.csv", index=False)
    assert pd.read_csv(tmp_path / "readout.csv")["top_1_id"].tolist() == ids


def test_a_readout_that_is_not_whole_is_refused(tiny_llama: Model, tmp_path: Path) -> None:
    folder = tiny_llama.read("ab").save(tmp_path)
    content = json.loads((folder / "readout.json").read_text())
    (folder / "readout.json").write_text(json.dumps(content | {"kind": "lens"}))
    with pytest.raises(ValueError, match="'lens'"):
        Readout.load(folder)
    with pytest.raises(FileNotFoundError, match=r"readout\.json"):
        Readout.load(tmp_path / "nowhere")


def test_its_repr_is_short(tiny_llama: Model) -> None:
    text = repr(tiny_llama.read(["ab", "c"], layers=[1, 3]))
    assert text == (
        "Readout(2 lenses × 2 layers × 2 readings, top 5, of tiny-llama: logit lens, SPADE; "
        "layers 1, 3)"
    )


def test_it_draws_itself(tiny_llama: Model) -> None:
    readout = tiny_llama.read("abc", positions="all")
    assert len(readout.plot().axes) >= 2
    with pytest.raises(TypeError, match="no option"):
        readout.plot(colour="red")


# -- wrong types, where nothing checks annotations

WRONG = """
import spade_lens as sl
from tiny import tiny, tiny_tokenizer
model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer(), name="tiny-llama")
calls = {
    "order": lambda: sl.read(sl.Spade(model), "ab"),
    "a model first": lambda: sl.read(model, "ab"),
    "no lens": lambda: sl.read("ab", 3, model=model),
    "token ids": lambda: model.read([1, 5, 9]),
    "keep": lambda: sl.Spade(model, keep="labels"),
    "top": lambda: model.read("ab", top_k="5"),
}
for name, call in calls.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def test_wrong_types_are_named() -> None:
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", WRONG], capture_output=True, text=True, env=environment, check=True
    )
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert said["order"].startswith("TypeError: The prompts were given as Spade(model); ")
    assert "read(prompts, lens, model=model)" in said["a model first"]
    assert "of type int was given; expected a lens" in said["no lens"]
    assert "Prompt(tokens=(...))" in said["token ids"]
    assert "keep='labels' was given; expected a function. For example keep=Keep(" in said["keep"]
    assert "top_k='5' was given" in said["top"]


def test_inference_mode_reads_alike_and_a_lens_may_not_write_there_either() -> None:
    class Writing(LogitLens):
        def final_residuals(self, residuals: Any, *rest: Any) -> torch.Tensor:
            residuals.stack.mul_(2)
            return super().final_residuals(residuals, *rest)

    model = load(tiny("llama"), tokenizer=tiny_tokenizer())
    with torch.inference_mode():
        inside = read("ab", model=model).to_frame()
        with pytest.raises(ValueError, match="changed the residuals"):
            read("ab", Writing(model))
    pd.testing.assert_frame_equal(inside, read("ab", model=model).to_frame())
