"""A result as one HTML page: what a browser needs stands in it, and nothing is asked of a network.

Tokens are data and never markup. They stand in a block of JSON, and the script writes them as
text. The page forbids every other script by the hash of its own.
"""

import base64
import hashlib
import html as markup
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from math import exp
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from spade_lens.checks import checked
from spade_lens.stats.frames import TableLike, as_frame
from spade_lens.storage.files import as_path, output_folder, write_atomically
from spade_lens.view.grid import data_of, readings_of

_FALLBACK_COLUMNS = 24
_NOTEBOOK_CELLS = 3000
"""A notebook stores what it shows: about 200 kB for so many cells."""


@checked
def html(table: TableLike, *, labels: Sequence[str] | None = None) -> str:
    """Return an HTML page of a readout: a table of layers and positions, or prompts, to look into.

    Colour, lens and difference of lenses are chosen on the page. A cell under the pointer or the
    keyboard's focus shows its top tokens. A pinned cell shows its column over the layers.

    Example:
        >>> readout = sl.read("ab->AB,cd->", "spade", model=model, positions="all")
        >>> page = sl.view.html(readout)
        >>> page.startswith("<!doctype html>"), "https://" in page
        (True, False)

    Args:
        table: A readout, or its frame. For fewer layers or positions, filter the frame.
        labels: What stands above each position or prompt. By default the text's tokens as far as
            the readout knows them, which is all but the first, or the numbers of prompts.

    Returns:
        The page. It needs no other file and no network, and works without a server.

    Raises:
        ValueError: If the table is not a readout's, is of several models, or there are not as many
            labels as readings.
    """
    frame = as_frame(table)
    data = data_of(frame, labels)
    return _page(data, _title(frame, data), "", _fallback(data))


@checked
def save_html(
    table: TableLike, path: str | PathLike[str], *, labels: Sequence[str] | None = None
) -> Path:
    """Write the page of a readout, for its method of this name, and return the path."""
    path = page_path(path)
    page = html(table, labels=labels)
    return write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))


def page_path(path: str | PathLike[str]) -> Path:
    """Return the path of a page that can be written; its folder is made.

    Raises:
        ValueError: If it does not end in ``.html``, is a folder, or its folder cannot be written.
    """
    path = as_path(path)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"The path {str(path)!r} was given; expected a file that ends in .html.")
    output_folder(path.parent)
    return path


def notebook_html(table: TableLike, about: str) -> str:
    """Return a page in a frame of its own, for a notebook. A large table is cut, and says so.

    Args:
        table: A readout, or its frame.
        about: The result in a line of text, for viewers of notebooks that show no frames.
    """
    frame = as_frame(table)
    readings = readings_of(frame)
    columns = frame["lens"].nunique() * frame["layer"].nunique()
    some = readings.head(max(1, _NOTEBOOK_CELLS // columns))
    note = ""
    if len(some) < len(readings):
        note = (
            f"The first {len(some)} of {len(readings)} readings. The method save_html(path) "
            "writes a page of all."
        )
        frame = frame.merge(some, on=["prompt", "position"])
    data = data_of(frame)
    page = _page(data, _title(frame, data), note, "")
    height = min(760, 420 + 27 * len(data["layers"]))
    return (
        f'<p>{markup.escape(about)}</p>\n<iframe title="{markup.escape(about)}" '
        f'sandbox="allow-scripts" style="width: 100%; height: {height}px; border: 0; '
        f'resize: vertical" srcdoc="{markup.escape(page)}"></iframe>'
    )


def _page(data: dict[str, Any], title: str, note: str, fallback: str) -> str:
    script, style = _part("viewer.js"), _part("viewer.css")
    return Template(_part("viewer.html")).substitute(
        title=markup.escape(title),
        note=markup.escape(note),
        fallback=fallback,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_json(data),
    )


def _title(frame: pd.DataFrame, data: dict[str, Any]) -> str:
    model = str(frame["model"].iloc[0]) if "model" in frame.columns else ""
    n_layers, n_columns = len(data["layers"]), len(data["labels"])
    sizes = f"{n_layers} layer{'s' * (n_layers != 1)} × {n_columns} reading{'s' * (n_columns != 1)}"
    return f"{model}: {sizes}".removeprefix(": ")


def _json(data: dict[str, Any]) -> str:
    """JSON that no parser of HTML can take for anything else: pure ASCII, without ``<``."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fallback(data: dict[str, Any]) -> str:
    """The top tokens as a plain table, for a browser that runs no script."""
    labels = data["labels"][:_FALLBACK_COLUMNS]
    n_layers, n_columns, k = len(data["layers"]), len(data["labels"]), data["k"]
    some = "" if len(labels) == n_columns else f" The first {len(labels)} of {n_columns} columns."
    lines = [f"<p>Without JavaScript this page shows the top tokens only.{some}</p>"]
    head = "".join(f'<th scope="col">{markup.escape(label)}</th>' for label in labels)
    for i, lens in enumerate(data["lenses"]):
        lines.append(
            f"<div><table><caption>{markup.escape(lens)}: top token and its probability</caption>"
            f'<tr><th scope="col">layer</th>{head}</tr>'
        )
        for j in reversed(range(n_layers)):
            cells = [((i * n_layers + j) * n_columns + c) * k for c in range(len(labels))]
            row = "".join(f"<td>{_fallback_cell(data, cell)}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{data["layers"][j]}</th>{row}</tr>')
        lines.append("</table></div>")
    return "<noscript>\n" + "\n".join(lines) + "\n</noscript>"


def _fallback_cell(data: dict[str, Any], cell: int) -> str:
    if data["tokens"][cell] < 0:
        return "–"
    word = markup.escape(data["words"][data["tokens"][cell]])
    return f"{word} {exp(-data['logprobs'][cell] / 1000):.2f}"


@cache
def _part(name: str) -> str:
    return files("spade_lens.view").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest())
    return f"sha256-{digest.decode('ascii')}"
