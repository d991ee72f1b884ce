"""The command line: ``spade-lens demo``, ``models`` and ``tasks``.

Says what went wrong in one message, without a traceback. Whatever imports torch is imported
inside the commands, so that ``--help`` need not wait for it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="spade-lens",
    help="What would the model say if it stopped at this layer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(StrEnum):
    """Number formats of weights and residuals."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def parse_layers(text: str) -> list[int]:
    """Layers out of text such as ``0,6,12-30``.

    Example:
        >>> parse_layers("0, 6, 12-15")
        [0, 6, 12, 13, 14, 15]

    Args:
        text: Numbers and ranges (both ends included), with commas between them.

    Returns:
        The layers, ascending, each once.

    Raises:
        ValueError: If a piece is neither a number nor a rising range.
    """
    layers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"--layers {text!r}: {piece.strip()!r} is neither a layer nor a rising range of "
                "layers. Write for example 0,6,12-30."
            )
        layers.update(range(first, last + 1))
    return sorted(layers)


@app.command()
def demo(
    model: Annotated[
        str,
        typer.Option(help="A name of the catalogue or of the Hugging Face hub, a folder, a GGUF."),
    ] = "smollm2-135m-instruct",
    task: Annotated[
        list[str] | None, typer.Option(help="A task; repeat for several. All by default.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Your own pairs: CSV with the columns input and output, or JSON."),
    ] = None,
    shots: Annotated[int, typer.Option(help="Demonstrations in every prompt.")] = 8,
    samples: Annotated[int, typer.Option(help="Prompts of every task.")] = 40,
    layers: Annotated[
        str | None, typer.Option(help="For example 0,6,12-30. All by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling of prompts.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for results.")] = Path("spade-lens-demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Of weights and residuals.")] = DType.float32,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Read finished tasks again.", show_default=False)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks.", show_default=False)
    ] = False,
) -> None:
    """Read several tasks at every layer with the logit lens, SPADE and its ablation.

    Prints a table and writes figures, CSVs and a JSON. A run that was interrupted goes on where
    it stopped when started again.
    """
    with _plain_errors(debug):
        import torch

        from spade_lens.demo import plan_demo, run_demo
        from spade_lens.models import catalog, load

        known = catalog().set_index("name")["n_layers"]
        plan = plan_demo(
            tasks=task or None,
            pairs=pairs,
            shots=shots,
            samples=samples,
            layers=None if layers is None else parse_layers(layers),
            seed=seed,
            out=out,
            n_layers=int(known[model]) if model in known else None,
        )
        loaded = load(model, device=device, dtype=getattr(torch, dtype))
        try:
            run_demo(loaded, plan, fresh=fresh)
        except KeyboardInterrupt:
            typer.echo(
                "\nStopped. The same command goes on after the last finished task.", err=True
            )
            raise typer.Exit(130) from None


@app.command()
def models() -> None:
    """List the models that need no model hub."""
    from spade_lens.models import catalog

    for entry in catalog().itertuples():
        typer.echo(entry.name)
        typer.echo(f"    {entry.architecture}")
        typer.echo(f"    {entry.download_mb:.0f} MB from {entry.source}; {entry.licence}")
    typer.echo("Every other name is looked up on the Hugging Face hub.")


@app.command()
def tasks() -> None:
    """List the tasks that come with the library."""
    from spade_lens.icl import task, task_names

    for name in task_names():
        found = task(name)
        (given, output), *_ = found.pairs
        typer.echo(f"{name:<18}{len(found.pairs):>4} pairs   {given} -> {output}")
        typer.echo(f"{'':<18}{found.description}")


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
    """Turn the library's own errors into one message and exit code 1."""
    from spade_lens.models import DownloadError

    try:
        yield
    except (ValueError, OSError, DownloadError) as error:
        if debug:
            raise
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None


def main() -> None:
    """The entry point of ``spade-lens``."""
    app()


if __name__ == "__main__":
    main()
