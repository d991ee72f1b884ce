"""Calibration text, from everything that a user may have, and from nothing."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import ARCHITECTURES, tiny, tiny_tokenizer

from spade_lens import Model, Prompt, load
from spade_lens.lenses.fitting.text import CalibrationText, calibration_text, sample_text


def words(model: Model, text: CalibrationText) -> list[str]:
    return [model.tokenizer.decode(piece.tokens[1:]) for piece in text.pieces]


def test_a_list_of_texts_is_cut_into_pieces_with_their_start_token(tiny_llama: Model) -> None:
    text = calibration_text(tiny_llama, ["abcdefgh", "xyz", ""], n_tokens=4)
    assert words(tiny_llama, text) == ["abc", "def", "gh", "xyz"]
    assert text.document == (0, 0, 0, 1)
    assert {piece.tokens[0] for piece in text.pieces} == {1}
    assert text.about == {"source": "3 texts", "seed": 0, "pieces": 4, "tokens": 15}


def test_without_a_start_token(tiny_llama: Model) -> None:
    text = calibration_text(tiny_llama, ["abcdefgh"], n_tokens=4, bos=False)
    assert [tiny_llama.tokenizer.decode(p.tokens) for p in text.pieces] == ["abcd", "efgh"]


def test_a_file_is_one_document_and_a_folder_has_one_per_file(
    tiny_llama: Model, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b/c.md").write_text("xyz")
    (tmp_path / "b/d.bin").write_bytes(b"\xff\xfe")
    assert calibration_text(tiny_llama, tmp_path / "a.txt", n_tokens=4).document == (0, 0)
    folder = calibration_text(tiny_llama, str(tmp_path), n_tokens=4)
    assert words(tiny_llama, folder) == ["abc", "def", "xyz"]
    assert folder.document == (0, 0, 1) and folder.about["source"] == str(tmp_path)


def test_a_long_document_leaves_room_for_others(tiny_llama: Model) -> None:
    texts = ["a" * 300] + ["b" * 3] * 40
    for seed in range(5):  # whether the long one comes first or last
        text = calibration_text(tiny_llama, texts, n_pieces=32, n_tokens=4, seed=seed)
        assert len(text.pieces) == 32 and text.document.count(0) <= 2
    # It gives more where there is nothing else.
    assert calibration_text(tiny_llama, texts[:3], n_pieces=32, n_tokens=4).document.count(0) == 30


def test_pieces_of_one_long_text_are_spread_over_it(tiny_llama: Model) -> None:
    text = calibration_text(tiny_llama, ["a" * 30 + "b" * 30], n_pieces=10, n_tokens=4)
    assert words(tiny_llama, text) == ["aaa"] * 5 + ["bbb"] * 5


def test_the_seed_decides_which_documents(tiny_llama: Model) -> None:
    texts = [chr(97 + i) * 3 for i in range(20)]
    one, same, other = (
        calibration_text(tiny_llama, texts, n_pieces=5, n_tokens=4, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same and one.sha256 == same.sha256
    assert one.document != other.document and one.sha256 != other.sha256
    assert list(one.document) == sorted(one.document)


def test_data_sets(tiny_llama: Model) -> None:
    rows = {"text": ["abc", "", "def"], "label": [0, 1, 0]}
    whole = datasets.Dataset.from_dict(rows)
    for data_set in (whole, whole.to_iterable_dataset()):
        text = calibration_text(tiny_llama, data_set, n_tokens=4)
        assert words(tiny_llama, text) == ["abc", "def"] and text.document == (0, 2)
    only = datasets.Dataset.from_dict({"sentence": ["abc"], "label": [0]})
    assert words(tiny_llama, calibration_text(tiny_llama, only)) == ["abc"]
    with pytest.raises(ValueError, match=r"Which column is the text.*\['question', 'answer'\]"):
        calibration_text(
            tiny_llama, datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
        )
    with pytest.raises(ValueError, match="There is no text in"):
        calibration_text(tiny_llama, datasets.Dataset.from_dict({"text": []}))


def test_a_data_set_by_name(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["abc"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = calibration_text(tiny_llama, "wikitext:wikitext-2-raw-v1")
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "train"})]
    assert text.about["source"] == "wikitext:wikitext-2-raw-v1"


def test_a_name_that_leads_nowhere(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: Any, **_kwargs: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist.\nMore.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="no file, folder or Hugging Face data set 'no/such'"):
        calibration_text(tiny_llama, "no/such")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        calibration_text(tiny_llama, "no/such")


def test_prompts_are_taken_as_they_are(tiny_llama: Model) -> None:
    prompts = [Prompt(tokens=(1, 5, 6), answer=1), Prompt(tokens=(1, 7))]
    text = calibration_text(tiny_llama, prompts)
    assert text.pieces == tuple(prompts) and text.document == (0, 1)
    assert calibration_text(tiny_llama, text) is text
    with pytest.raises(ValueError, match="outside the vocabulary"):
        calibration_text(tiny_llama, [Prompt(tokens=(1, 1000))])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "There is no text in 0 texts"),
        (["", "  "[:0]], ValueError, "There is no text in 2 texts"),
        ("a text\nof two lines", ValueError, r"Put text itself in a list"),
        ("x" * 2000, ValueError, r"Put text itself in a list"),
        (["abc", math.nan], TypeError, "A text is nan, a float"),
        ([None], TypeError, "A text is None"),
        (7, TypeError, "type int was given; expected a path"),
        (iter(["abc"]), TypeError, "Texts of your own go in a list"),
        ([Prompt(tokens=(1, 2)), "abc"], TypeError, r"mixes prompts and \['str'\]"),
    ],
)
def test_bad_sources(tiny_llama: Model, source: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        calibration_text(tiny_llama, source, seed=1)


def test_bad_sizes_and_files(tiny_llama: Model, tmp_path: Path) -> None:
    for sizes in ({"n_pieces": 0}, {"n_tokens": 1}, {"n_tokens": 129}):
        with pytest.raises(ValueError, match="at least one piece of 2 to 128 tokens"):
            calibration_text(tiny_llama, ["abc"], **sizes)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        calibration_text(tiny_llama, tmp_path / "latin.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no text in"):
        calibration_text(tiny_llama, tmp_path / "empty")
    with pytest.raises(ValueError, match="came without a tokenizer"):
        calibration_text(load(tiny("llama")), ["abc"])
    with pytest.raises(ValueError, match="calibration text is empty"):
        CalibrationText((), ())
    with pytest.raises(ValueError, match="2 document numbers were given for 1 pieces"):
        CalibrationText((Prompt(tokens=(1,)),), (0, 1))


# -- text that the model writes


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_sampling_with_a_cache_is_sampling_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in ARCHITECTURES
    model = load(tiny(name))
    cached = sample_text(model, n_pieces=3, n_tokens=12, seed=5)
    monkeypatch.setattr("transformers.PreTrainedModel", ())  # as for a HookedTransformer
    assert cached == sample_text(model, n_pieces=3, n_tokens=12, seed=5)


def test_sampled_text_is_seeded_and_starts_with_the_start_token(tiny_llama: Model) -> None:
    one, same, other = (
        calibration_text(tiny_llama, n_pieces=3, n_tokens=10, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same and one.pieces != other.pieces
    assert all(len(piece) == 10 and piece.tokens[0] == 1 for piece in one.pieces)
    assert one.document == (0, 1, 2)
    assert one.about["source"] == "sampled from tiny-llama"


def test_sampled_text_follows_the_models_distribution(tiny_llama: Model) -> None:
    pieces = sample_text(tiny_llama, n_pieces=2000, n_tokens=2)
    drawn = torch.bincount(torch.tensor([p.tokens[1] for p in pieces]), minlength=97) / 2000
    with torch.no_grad():
        logits = tiny_llama.original(torch.tensor([[1]])).logits[0, -1]
    # Total variation of 2000 draws from 97 tokens is below 0.1 with near certainty.
    assert 0.5 * (drawn - logits.softmax(-1)).abs().sum() < 0.1


def test_sampling_needs_a_start_token() -> None:
    hf_model = tiny("llama")
    hf_model.config.bos_token_id = None
    with pytest.raises(ValueError, match="names no start token to write after"):
        sample_text(load(hf_model), n_pieces=1, n_tokens=4)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="The start token is needed"):
        sample_text(load(tiny("llama"), tokenizer=tokenizer), n_pieces=1, n_tokens=4)
