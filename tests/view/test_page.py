"""A page holds the numbers of its readout, stands alone, and shows every token as text."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, hostile_readout, made_readout

import spade_lens as sl

SCRIPT = files("spade_lens.view").joinpath("viewer.js")


class Parsed(HTMLParser):
    """The tags, attributes and texts of a page, as a browser takes them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open, []).append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def data_of(page: str) -> dict:
    return json.loads(Parsed(page).texts["script"][0])


def test_it_holds_the_numbers_of_the_readout(tiny_llama: sl.Model) -> None:
    readout = sl.read("ab->AB,cd->", ["logit", "spade"], model=tiny_llama, positions="all")
    data = data_of(sl.view.html(readout))
    shape = readout.entropy.shape
    tokens = np.array(data["tokens"]).reshape(*shape, data["k"])
    for index, token in np.ndenumerate(readout.top_tokens.numpy()):
        assert data["words"][tokens[index]] == readout.words[token].replace(" ", "·")
    logprobs = -np.array(data["logprobs"]).reshape(tokens.shape) / 1000
    np.testing.assert_allclose(logprobs, readout.top_logprobs.numpy(), atol=6e-4)
    measures = {m["short"]: m["values"] for m in data["measures"]}
    for name, values in (("entropy", readout.entropy), ("KL", readout.kl)):
        found = np.array(measures[name]).reshape(shape) / 1000
        np.testing.assert_allclose(found, values.numpy(), atol=6e-4)
    assert measures["agrees"] == readout.agrees.flatten().int().tolist()
    # The last position has no target: it is missing there, and nowhere else.
    ranks = readout.target_rank.flatten().tolist()
    assert measures["target's rank"] == [None if rank < 0 else rank for rank in ranks]
    assert data["labels"] == ["(start)", *"ab->AB,cd->"] and data["layers"] == [0, 1, 2, 3, 4]
    assert data["names"][3] == "position 3" and data["targets"][-1] == -1


def test_it_stands_alone() -> None:
    page = sl.view.html(made_readout(2, 3, 4))
    parsed = Parsed(page)
    for _, attributes in parsed.tags:
        assert not {"src", "srcset", "action", "style", "onclick"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    policy = next(m["content"] or "" for m in parsed.attributes("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for text in (parsed.texts["script"][1], parsed.texts["style"][0]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_hostile_text_stays_text() -> None:
    page = sl.view.html(hostile_readout(), labels=[*HOSTILE[:-1], "\ud800"])
    parsed = Parsed(page)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2 and tags.count("style") == 1 and tags.count("title") == 1
    assert not {"img", "b", "i"} & set(tags)
    assert "\ud800" not in page and not re.search("[\x00\x1b\u202e\u200b]", page)
    data = data_of(page)
    assert "<script>window.hacked=1</script>" in data["words"]
    for shown in ("\\x00", "\\x1b[31mred", "\\u202eabc", "a↵b", "\\u200b", "שלום"):
        assert shown in data["words"]
    assert f"{'x' * 120}… (10000 characters)" in data["words"]
    assert data["labels"][-1] == "\\ud800"
    # The block of JSON is ASCII without any sign that a parser of HTML looks for.
    block = page[page.index('id="data">') + len('id="data">') :].partition("</script>")[0]
    assert block.isascii() and not set("<>&") & set(block)
    # A notebook's page lies in an attribute, and its line of text is text.
    shown = sl.view.page.notebook_html(hostile_readout(), HOSTILE[0])
    frame = Parsed(shown)
    assert [tag for tag, _ in frame.tags] == ["p", "iframe"]
    assert frame.attributes("iframe")[0]["sandbox"] == "allow-scripts"
    assert data_of(frame.attributes("iframe")[0]["srcdoc"] or "")["words"] == data["words"]


def test_layers_that_a_lens_does_not_read_and_what_is_infinite() -> None:
    frame = made_readout(2, 3, 2)
    frame = frame[(frame["lens"] == "logit lens") | (frame["layer"] > 0)]
    frame.loc[frame.index[0], "kl"] = np.inf
    data = data_of(sl.view.html(frame))
    assert data["tokens"][18:24] == [-1] * 6 and data["logprobs"][18:24] == [None] * 6
    assert data["measures"][2]["values"][0] == 10**9
    assert data["looks"] == [1, 0]  # the colours that figures have for these two lenses


def test_prompts_and_labels(tiny_llama: sl.Model) -> None:
    readout = sl.read(["ab->", "q->", "xyz->"], "logit", model=tiny_llama)
    data = data_of(sl.view.html(readout))
    assert data["columns"] == "prompt" and data["labels"] == ["prompt 0", "prompt 1", "prompt 2"]
    assert data["names"] == ["position 4", "position 3", "position 5"]
    assert data["targets"] == [-1, -1, -1] and len(data["measures"]) == 4
    assert data_of(sl.view.html(readout, labels=["a b", "c", "d"]))["labels"] == ["a·b", "c", "d"]


def test_without_a_script_there_is_a_plain_table() -> None:
    frame = made_readout(2, 3, 30)
    page = sl.view.html(frame)
    plain = page[page.index("<noscript>") : page.index("</noscript>")]
    assert "The first 24 of 30 columns." in plain and plain.count("<table>") == 2
    first = frame[(frame["layer"] == 2) & (frame["position"] == 0)].iloc[0]
    word, probability = first["top_1"].replace(" ", "·"), exp(first["top_1_logprob"])
    assert f'<th scope="row">2</th><td>{word} {probability:.2f}</td>' in plain


def test_a_long_text_is_small_enough() -> None:
    page = sl.view.html(made_readout(2, 30, 512, k=5))
    assert len(page.encode()) < 5e6 / 2


def test_a_notebook_shows_a_part_and_says_so(tiny_llama: sl.Model) -> None:
    small = sl.read("ab->", "logit", model=tiny_llama, positions="all")
    shown = small._repr_html_()
    assert shown.startswith(f"<p>{small!r}</p>") and "save_html" not in shown
    large = sl.view.page.notebook_html(made_readout(2, 30, 512, k=5), "Readout")
    page = Parsed(large).attributes("iframe")[0]["srcdoc"] or ""
    assert "The first 50 of 512 readings. The method save_html(path) writes a page of all." in page
    assert len(data_of(page)["labels"]) == 50 and len(large) < 500_000


def test_save(tiny_llama: sl.Model, tmp_path: Path) -> None:
    readout = sl.read("ab->", "logit", model=tiny_llama, positions="all")
    path = readout.save_html(tmp_path / "new" / "page.html", labels=list("<a1->"))
    assert path.read_text(encoding="utf-8") == sl.view.html(readout, labels=list("<a1->"))
    for wrong in ("page.txt", "page", ""):
        with pytest.raises(ValueError, match=r"expected a file that ends in \.html|not blank"):
            readout.save_html(wrong and tmp_path / wrong)


def test_errors() -> None:
    frame = made_readout(1, 2, 3)
    with pytest.raises(ValueError, match=r"lacks \['kl'\].*Make it with spade_lens.read"):
        sl.view.html(frame.drop(columns="kl"))
    with pytest.raises(ValueError, match=r"models \['made', 'other'\]"):
        sl.view.html([frame, frame.assign(model="other", prompt=1)])
    with pytest.raises(ValueError, match="Several rows are of one lens, layer, prompt"):
        sl.view.html([frame, frame])
    with pytest.raises(ValueError, match="2 labels were given; expected one for each of 3"):
        sl.view.html(frame, labels=["a", "b"])
    with pytest.raises(ValueError, match="has no rows"):
        sl.view.html(frame.iloc[:0])
    with pytest.raises(ValueError, match=r"lacks \['top_2_logprob'\]"):
        sl.view.html(frame.drop(columns="top_2_logprob"))
    with pytest.raises(ValueError, match=r"\['kl'\] are there more than once"):
        sl.view.html(pd.concat([frame, frame[["kl"]]], axis=1))


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("layer", lambda layer: layer.astype(str), "whole numbers"),  # a page without a reading
        ("layer", lambda layer: layer + 0.5, "whole numbers"),  # likewise
        ("layer", lambda layer: layer.where(layer > 0), "whole numbers"),
        ("kl", lambda kl: "none", "numbers"),
        ("agrees", lambda agrees: "yes", "numbers"),
        ("top_1_logprob", lambda logprob: [None] * len(logprob), "numbers"),
        ("top_1", lambda top: 5, "text"),
    ],
)
def test_columns_of_another_kind_are_refused(column: str, values: Any, expected: str) -> None:
    frame = made_readout(1, 2, 3)
    with pytest.raises(
        ValueError, match=rf"not those of a readout: {column} \(expected {expected}"
    ):
        sl.view.html(frame.assign(**{column: values(frame[column])}))
    whole = frame.assign(layer=frame["layer"].astype(float), kl=np.nan)
    assert data_of(sl.view.html(whole))["layers"] == data_of(sl.view.html(frame))["layers"]


def test_the_script_is_short_and_checked() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "// @ts-check" and len(lines) <= 600 and max(map(len, lines)) <= 120
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    assert "</script" not in text and "<!--" not in text
    if node := shutil.which("node"):
        subprocess.run([node, "--check", str(SCRIPT)], check=True)


def test_readings_come_in_the_order_of_the_table() -> None:
    frame = made_readout(1, 2, 4)
    order = pd.concat([frame[frame["position"] == p] for p in (2, 0, 3)])
    data = data_of(sl.view.html(order))
    assert data["names"] == ["position 2", "position 0", "position 3"]
    tops = [data["words"][data["tokens"][column * 3]] for column in range(3)]
    layer_0 = frame[frame["layer"] == 0].set_index("position")["top_1"]
    assert tops == [layer_0[p].replace(" ", "·") for p in (2, 0, 3)]
