"""What the commands share: options in the same words, how they run, and how they fail."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from spade_lens.models.model import Model
    from spade_lens.studies.base import Plan


class DType(StrEnum):
    """Number formats of weights and residuals."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class LensKind(StrEnum):
    """Linear lenses that can be fitted."""

    l_spade = "l-spade"
    tuned = "tuned"


def option(default: Any, text: str, *flags: str, group: str | None = None) -> Any:
    """Return an option of a command: its default, its help text, and its flags if not its name.

    Options of one group stand together in the help.
    """
    return typer.Option(default, *flags, help=text, rich_help_panel=group)


MODEL = option(
    "smollm2-135m-instruct",
    "A name of the catalogue or of the Hugging Face hub, a folder, or a GGUF file.",
)
PAIRS = option(None, "Your own pairs: CSV with the columns input and output, or JSON.")
SHOTS = "Demonstrations in every prompt."
LAYERS = option(None, "For example 0,6,12-30. By default all.")
DEVICE = option("cpu", "cpu or cuda.")
DTYPE = option(DType.float32, "Number format of weights and residuals.")
OUT = "The folder for results."
DEBUG = option(False, "Show tracebacks.", "--debug")


def parse_layers(text: str | None, flag: str = "--layers", one: str = "layer") -> list[int] | None:
    """Return the layers in text such as ``0,6,12-30``, in that order; None for None.

    Example:
        >>> parse_layers("0, 6, 12-15")
        [0, 6, 12, 13, 14, 15]

    Args:
        text: The text.
        flag: The option that it was given with.
        one: What a number stands for.
    """
    if text is None:
        return None
    layers: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"{flag} {text!r}: {piece.strip()!r} is neither a {one} nor a rising range of "
                f"{one}s. Write for example 0,6,12-30."
            )
        layers += range(first, last + 1)
    return layers


def parse_positions(text: str) -> str | list[int]:
    """Return positions given as ``last``, ``all``, or numbers such as ``3,-1``.

    Example:
        >>> parse_positions("3, -1")
        [3, -1]
    """
    if text in ("last", "all"):
        return text
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text):
        raise ValueError(
            f"--positions {text!r} was given; expected last, all, or numbers such as 3,-1."
        )
    return [int(piece) for piece in text.split(",")]


def layers_before_loading(model: str) -> int | None:
    """Return how many layers a model of the catalogue has, without loading it."""
    from spade_lens.models.catalogue import CATALOG

    return CATALOG[model].n_layers if model in CATALOG else None


def check_layers(model: str, layers: list[int] | None) -> None:
    """Raise a ValueError for layers that a model of the catalogue has not, before it is loaded."""
    n_layers = layers_before_loading(model)
    twice = [n for n in dict.fromkeys(layers or ()) if (layers or []).count(n) > 1]
    if twice:
        raise ValueError(f"--layers names {twice} twice; give each layer once.")
    outside = [n for n in layers or () if n_layers is not None and n > n_layers]
    if outside:
        raise ValueError(
            f"Layers {outside} were asked for; expected layers from 0 (the embedding) to "
            f"{n_layers} (the model's output)."
        )


def load_model(model: str, device: str, dtype: str) -> "Model":
    """Load a model by the words of the command line."""
    import torch

    from spade_lens.models.loading import load

    return load(model, device=device, dtype=getattr(torch, dtype))


def run_plan(kind: "type[Plan]", params: dict[str, Any], **given: Any) -> None:
    """Build a plan of the parameters of a command, load the model, and run the plan.

    The plan's fields have the names of parameters, and what is None is left to its default; fields
    that are not parameters of the same name are ``given``.
    """
    names = {field.name for field in fields(kind)}
    values = {name: value for name, value in params.items() if value is not None}
    values |= {"layers": parse_layers(params["layers"]), **given}
    from spade_lens import studies
    from spade_lens.settings import Settings

    plan = kind(**{name: value for name, value in values.items() if name in names})
    if n_layers := layers_before_loading(params["model"]):
        plan.check_layers(n_layers)
    settings = Settings(memory_limit=params.get("memory"))
    loaded = load_model(params["model"], params["device"], params["dtype"])
    with interruptible():
        studies.study(loaded, plan, fresh=params.get("fresh", False), settings=settings)


@contextmanager
def interruptible() -> Iterator[None]:
    """Say after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command resumes from what is finished.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn the library's own errors into one message and exit code 1, its warnings into one."""
    from spade_lens.checks import visible
    from spade_lens.storage.download import DownloadError

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        typer.secho(visible(f"Warning: {message}"), err=True, fg="yellow")

    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.filterwarnings("default", category=UserWarning)
                warnings.showwarning = show
            yield
    except (ValueError, OSError, DownloadError) as error:
        if debug:
            raise
        typer.secho(visible(f"Error: {error}"), err=True, fg="red")
        raise typer.Exit(1) from None
