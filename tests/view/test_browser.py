"""Pages in headless Chromium: look, keyboard, search, hostile text. Skipped where there is none.

The browser is the system's own (Debian: ``apt-get install chromium``), its driver the package
``playwright`` of the extra ``browser``.
"""

import shutil
from collections.abc import Callable, Iterator
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, hostile_readout, made_readout

import spade_lens as sl

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

FRAME = made_readout(2, 5, 40)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; at the end, nothing was said in the console and nothing was asked for."""
    said: list[str] = []
    contexts = []

    def request(asked: Any) -> None:
        if not asked.url.startswith(("file:", "data:", "about:")):
            said.append(asked.url)

    def open_page(text: str, width: int = 1200, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", request)
        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(text, encoding="utf-8")
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said


def row_of(lens: str, layer: int, position: int) -> pd.Series:
    at = (FRAME["lens"] == lens) & (FRAME["layer"] == layer) & (FRAME["position"] == position)
    return FRAME[at].iloc[0]


def cell(page: Any, lens: int, layer: int, column: int) -> Any:
    return page.locator(f'td[data-at="{lens} {layer} {column}"]')


def seen(token: str) -> str:
    return token.replace(" ", "·")


def test_pointer(opened: Open) -> None:
    page = opened(sl.view.html(FRAME))
    # A page of columns, the output on top; tokens and numbers are those of the table.
    assert page.locator("#table tbody td").count() == 5 * 32
    assert page.locator("#table tbody th").all_inner_texts() == ["4", "3", "2", "1", "0"]
    row = row_of("logit lens", 3, 7)
    assert cell(page, 0, 3, 7).inner_text() == seen(row["top_1"])
    cell(page, 0, 3, 7).hover()
    here = page.locator("#here").inner_text()
    assert f"Layer 3, ·t6 (position 7); target {seen(row['target'])}" in here
    for lens in ("logit lens", "SPADE"):
        row = row_of(lens, 3, 7)
        for k in (1, 2, 3):
            assert f"{seen(row[f'top_{k}'])}\t{exp(row[f'top_{k}_logprob']):.3f}" in here
        assert f"entropy {row['entropy']:.2f}" in here and f"rank {row['target_rank']}" in here
    # Pinned: a line and a column of values for every lens.
    cell(page, 0, 3, 7).click()
    cell(page, 0, 0, 1).hover()
    assert page.locator("#course path[stroke]").count() == 2 + 2  # lines, and their key
    assert page.locator("#course circle").count() == 2 * 5
    values = page.locator("#course tbody tr").all_inner_texts()
    assert values[4 - 1].split("\t")[2] == (
        f"{seen(row_of('SPADE', 1, 7)['top_1'])} {exp(row_of('SPADE', 1, 7)['top_1_logprob']):.3f}"
    )
    page.get_by_role("button", name="Unpin").click()
    assert page.locator("#course path").count() == 0


def test_keyboard_alone(opened: Open) -> None:
    page = opened(sl.view.html(FRAME))
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    # The last two: the button Next, and one cell of the table.
    assert order == ["lens", "measure", "find", "numbers", "SPAN", "next", "TD"]
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    row = row_of("logit lens", 3, 2)
    assert focused.startswith(f"logit lens, layer 3, ·t1, position 2: {seen(row['top_1'])} 0.")
    assert seen(row["top_3"]) in page.locator("#here").inner_text()
    page.keyboard.press("Enter")
    assert cell(page, 0, 3, 2).get_attribute("aria-selected") == "true"
    assert "Layer 3, ·t1 (position 2)" in page.locator("#course").inner_text()
    page.keyboard.press("Escape")
    assert "Pin a cell" in page.locator("#course").inner_text()
    # The end of the row, and over it to the next page of columns.
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert "33 to 40 of 40" in page.locator("#range").inner_text()
    assert page.evaluate("document.activeElement.dataset.at") == "0 3 32"
    # A part of the text, by Shift and arrows.
    page.locator("#strip span").nth(4).focus()
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    assert "5 to 8 of 40, 4 chosen" in page.locator("#range").inner_text()
    assert page.locator("#table tbody td").count() == 5 * 4
    page.keyboard.press("Escape")
    assert "1 to 32 of 40" in page.locator("#range").inner_text()


def test_lenses_measures_and_differences(opened: Open) -> None:
    page = opened(sl.view.html(FRAME))
    page.select_option("#lens", label="all, side by side")
    assert page.locator("#table tbody td").count() == 5 * 2 * 16
    page.select_option("#lens", label="SPADE")
    page.select_option("#measure", label="entropy (nats)")
    page.check("#numbers")
    spade, logit = row_of("SPADE", 2, 5), row_of("logit lens", 2, 5)
    assert cell(page, 1, 2, 5).inner_text() == f"{spade['entropy']:.2f}"
    page.select_option("#lens", label="SPADE minus logit lens")
    difference = f"{spade['entropy'] - logit['entropy']:+.2f}".replace("-", "−")
    assert cell(page, 1, 2, 5).inner_text() == difference
    page.select_option("#measure", label="rank of the target (0: top)")
    difference = f"{spade['target_rank'] - logit['target_rank']:+d}".replace("-", "−")
    assert cell(page, 1, 2, 5).inner_text() == difference


def test_infinity_minus_infinity_is_no_number(opened: Open) -> None:
    frame = FRAME.copy()
    frame.loc[(frame["layer"] == 2) & (frame["position"] == 5), "kl"] = np.inf
    page = opened(sl.view.html(frame))
    page.check("#numbers")
    page.select_option("#lens", label="SPADE")
    page.select_option("#measure", label="KL from the model (nats)")
    assert cell(page, 1, 2, 5).inner_text() == "∞"
    page.select_option("#lens", label="SPADE minus logit lens")
    assert cell(page, 1, 2, 5).inner_text() == "–"


def test_search(opened: Open) -> None:
    page = opened(sl.view.html(FRAME))
    word = row_of("logit lens", 2, 5)["top_2"]
    of_lens = FRAME[FRAME["lens"] == "logit lens"]
    found = of_lens[of_lens[["top_1", "top_2", "top_3"]].eq(word).any(axis=1)]
    page.fill("#find", word.strip().upper())
    said = page.locator("#found").inner_text()
    assert f"among the top 3 of {len(found)} of 200 cells" in said
    assert f"lowest at layer {found['layer'].min()}" in said
    assert cell(page, 0, 2, 5).inner_text().startswith("#2 ")
    page.fill("#find", "w4")
    if not of_lens.isin([" w4"]).any(axis=None):
        assert "Tokens that begin so" in page.locator("#found").inner_text()
    page.fill("#find", "nowhere")
    assert page.locator("#found").inner_text() == "Not among the top 3 anywhere."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_contrast(opened: Open, scheme: str) -> None:
    page = opened(sl.view.html(FRAME), width=360, color_scheme=scheme)
    cell(page, 0, 4, 0).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Text on what is behind it, WCAG AA: every element with text of its own.
    worst = page.evaluate(
        """() => {
          const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const light = (colour) => {
            const line = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            const [r, g, b] = numbers(colour).slice(0, 3).map((c) => line(c / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            for (let e = element; e; e = e.parentElement) {
              const colour = getComputedStyle(e).backgroundColor;
              if (numbers(colour)[3] !== 0) return colour;
            }
            return "rgb(255, 255, 255)";
          };
          let worst = 21;
          for (const element of document.querySelectorAll("main *")) {
            const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
            if (!own || !element.checkVisibility() || element.closest("noscript")) continue;
            const style = getComputedStyle(element);
            const ink = element.closest("svg") ? style.fill : style.color;
            const [a, b] = [light(ink), light(behind(element))];
            worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
          }
          return worst;
        }"""
    )
    assert worst >= 4.5


def test_hostile_text_stays_text(opened: Open) -> None:
    page = opened(sl.view.html(hostile_readout(), labels=HOSTILE))
    cell(page, 0, 2, 0).click()
    page.fill("#find", "<script>")
    page.fill("#find", HOSTILE[0])
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main b, main i").count() == 0
    assert HOSTILE[0] in page.locator("#here").inner_text()
    assert "<i>model</i>" in page.locator("h1").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    shown = opened(sl.view.page.notebook_html(hostile_readout(), HOSTILE[0]))
    inside = shown.frames[1]
    inside.locator("#table td").first.click()
    assert inside.locator("#course circle").count() > 0
    assert [frame.evaluate("window.hacked") for frame in shown.frames] == [None, None]


def test_without_javascript(opened: Open) -> None:
    page = opened(sl.view.html(FRAME), java_script_enabled=False)
    assert page.locator("noscript table").count() in (0, 2)  # text or elements, by the browser
    assert "Without JavaScript this page shows the top tokens only" in page.content()
