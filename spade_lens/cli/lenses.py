"""The commands about lenses: ``read`` a text, ``fit`` a lens."""

from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spade_lens.cli import options as opt
from spade_lens.cli.options import DType, LensKind, option, plain_errors

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 100


def read(
    text: str = typer.Argument(help="The text to read."),
    lens: list[str] = option(
        ["logit", "spade"],
        "logit, spade, l-spade, tuned, or the folder of a fitted lens; repeat for several.",
    ),
    layers: str | None = opt.LAYERS,
    top: int = option(3, "Top tokens to show."),
    positions: str | None = option(
        None,
        "Where to read: last, all, or positions such as 3,-1. By default last; for --html all.",
    ),
    csv: Path | None = option(None, "Write the table to this CSV file, too."),
    html: Path | None = option(
        None, "Write an interactive page to this HTML file, instead of showing the table."
    ),
    model: str = opt.MODEL,
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    debug: bool = opt.DEBUG,
) -> None:
    """Show what each lens reads in a text, layer by layer: top tokens, probabilities, entropy."""
    with plain_errors(debug):
        wanted = opt.parse_layers(layers)
        places = opt.parse_positions(positions or ("last" if html is None else "all"))
        from spade_lens import lenses, storage
        from spade_lens.studies.fit import check_lens_name, named_lens
        from spade_lens.view.page import page_path

        for name in lens:  # refused before the model is loaded, which takes long
            check_lens_name(name)
        opt.check_layers(model, wanted)
        if top < 1:
            raise ValueError(f"--top {top} was given; expected a whole number from 1.")
        if csv is not None:
            if csv.expanduser().is_dir():
                raise ValueError(f"--csv {str(csv)!r} is a folder; expected a file.")
            csv = storage.files.output_folder(csv.expanduser().parent) / csv.name
        if html is not None:
            html = page_path(html)

        loaded = opt.load_model(model, device, dtype)
        chosen = [named_lens(loaded, name) for name in lens]
        prompt = loaded.prompt(text)
        readout = lenses.read(prompt, chosen, layers=wanted, positions=places, top_k=top)
        frame = readout.to_frame()
        typer.echo(f"{loaded.name}, {loaded.n_layers} layers; {len(prompt)} tokens")
        words = {p: loaded.word(prompt.tokens[p]) for p in frame["position"].unique().tolist()}
        if html is not None:
            typer.echo(f"\n{readout.save_html(html, labels=list(words.values()))}")
        else:
            for position, word in words.items():
                rows = frame[frame["position"] == position]
                typer.echo(f"\nAfter {word!r} (position {position})\n\n{_table(rows, top)}")
        if csv is not None:
            typer.echo(f"\n{storage.write_csv(csv, frame)}")


def _table(rows: "pd.DataFrame", top: int) -> str:
    """Layers downwards, lenses across, as many side by side as fit 100 columns."""
    cells: dict[str, dict[int, str]] = {}
    for row in rows.to_dict("records"):
        tokens = [_cell(row[f"top_{k}"], row[f"top_{k}_logprob"]) for k in range(1, top + 1)]
        line = f"{row['entropy']:5.2f}  {' '.join(tokens)}"
        cells.setdefault(row["lens"], {})[row["layer"]] = line.rstrip()
    width = 7 + top * 13
    abreast = max(1, (_WIDTH - 7) // width)
    blocks = []
    names = list(cells)
    for first in range(0, len(names), abreast):
        some = names[first : first + abreast]
        lines = ["layer  " + "".join(f"{f'{name}: entropy, top tokens':<{width}}" for name in some)]
        for layer in cells[some[0]]:
            lines.append(f"{layer:>5}  " + "".join(f"{cells[n][layer]:<{width}}" for n in some))
        blocks.append("\n".join(line.rstrip()[:_WIDTH] for line in lines))
    return "\n\n".join(blocks)


def _cell(token: str, logprob: float) -> str:
    """A token and its probability in 12 columns; a longer token is cut."""
    text, probability = repr(token), exp(logprob)
    text = text if len(text) <= 8 else f"{text[:6]}…'"
    return f"{text:<8} " + ("1.0" if probability > 0.995 else f"{probability:.2f}"[1:])


def fit(
    model: str = opt.MODEL,
    kind: LensKind = option(LensKind.l_spade, "What to fit: L-SPADE or the tuned lens."),
    text: str | None = option(
        None,
        "A text file, a folder of them, or a Hugging Face data set. By default the model writes "
        "the text itself.",
    ),
    pieces: int = option(160, "Pieces of text."),
    piece_tokens: int = option(128, "Tokens of a piece."),
    per_piece: int = option(32, "Positions to learn from in every piece."),
    layers: str | None = option(None, "For example 12-29. By default all below the last."),
    rank: int | None = option(None, "L-SPADE: largest rank of what a map adds. By default any."),
    passes: int | None = option(
        None, "Passes of descent on the KL divergence. By default 2 for the tuned lens, else 0."
    ),
    seed: int = option(0, "Seed of every random choice."),
    out: Path | None = option(None, "The folder. By default the cache, where `exit` looks for it."),
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    debug: bool = opt.DEBUG,
) -> None:
    """Fit a linear lens, L-SPADE or the tuned lens, and report it on held-out text.

    After an interruption the same command resumes.
    """
    with plain_errors(debug):
        if rank is not None and kind is not LensKind.l_spade:
            raise ValueError("--rank is for --kind l-spade; the tuned lens' maps are whole.")
        options: dict[str, Any] = {"layers": opt.parse_layers(layers), "per_piece": per_piece}
        if passes is not None:
            options["passes"] = passes
        if kind is LensKind.l_spade:
            options["rank"] = rank
        from spade_lens.studies.fit import fit_lens, held_out_text, lens_folder

        loaded = opt.load_model(model, device, dtype)
        with opt.interruptible():
            lens = fit_lens(
                loaded,
                kind.value,
                text=text,
                n_pieces=pieces,
                n_tokens=piece_tokens,
                seed=seed,
                out=out,
                **options,
            )
        typer.echo(f"\n{lens!r}, on documents that it was not fitted on:\n")
        typer.echo(held_out_text(lens.held_out))
        typer.echo(f"\nIn {lens_folder(loaded, kind.value) if out is None else out}")
