"""What the commands of the command line share: options in the same words, and how they fail."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DType(StrEnum):
    """Number formats of weights and residuals."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LensKind(StrEnum):
    """Linear lenses that can be fitted."""

    l_spade = "l-spade"
    tuned = "tuned"


# What several commands ask for in the same words.
ModelName = Annotated[
    str, typer.Option(help="A name of the catalogue or of the Hugging Face hub, a folder, a GGUF.")
]
Pairs = Annotated[
    Path | None,
    typer.Option(help="Your own pairs: CSV with the columns input and output, or JSON."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[DType, typer.Option(help="Of weights and residuals.")]
Out = Annotated[Path, typer.Option(help="The folder for results.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", show_default=False)]
DEFAULT = "smollm2-135m-instruct"


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


@contextmanager
def interruptible() -> Iterator[None]:
    """Say after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on from what is finished.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn the library's own errors into one message and exit code 1, its warnings into one."""
    from spade_lens.storage.download import DownloadError

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        typer.secho(f"Warning: {message}", err=True, fg="yellow")

    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.filterwarnings("default", category=UserWarning)
                warnings.showwarning = show
            yield
    except (ValueError, OSError, DownloadError) as error:
        if debug:
            raise
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1) from None
