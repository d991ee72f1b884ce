"""Fit a linear lens, report how good it is, and keep it where it is found again.

This module does not know how a lens is fitted.
"""

from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pandas as pd

from spade_lens import plots
from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.fitting.text import TextSource
from spade_lens.lenses.lens import Lens
from spade_lens.lenses.linear import FittedLens
from spade_lens.lenses.named import NAMED
from spade_lens.lenses.saving import load_lens
from spade_lens.models.identity import hooks_of, refuse_unnamed, run_identity
from spade_lens.models.model import Model
from spade_lens.settings import Settings, scoped
from spade_lens.storage.checkpoint import kept_folder
from spade_lens.storage.content import content_sha256
from spade_lens.storage.download import cache_dir
from spade_lens.storage.files import output_folder, set_aside, write_csv
from spade_lens.storage.origin import versions

Kind = Literal["l-spade", "tuned"]


def lens_folder(model: Model, kind: Kind) -> Path:
    """Return where the default lens of a model is kept: in the cache, by all that decides it."""
    deciding = run_identity(model) | {"spade_lens": versions()["spade-lens"]}
    return cache_dir() / "lenses" / f"{content_sha256(deciding)}-{kind}"


def default_lens(model: Model, kind: Kind = "l-spade") -> FittedLens:
    """Return the default lens of a model: from the cache, or fitted now and kept there.

    One that is damaged is fitted again; inside hooks without a name none is kept.
    """
    place = kept_folder(lens_folder(model, kind), model)
    if place is None:
        return fit(kind, model)
    try:
        return load_lens(place, model)
    except FileNotFoundError:
        pass
    except ValueError as error:
        set_aside(place / "lens.json", error)
    print(f"There is no {kind} lens of {model.name} yet. Fitting one, to be kept in {place}.")
    return fit_lens(model, kind, out=place)


def named_lens(model: Model, name: str) -> Lens:
    """Return a lens by a name that :func:`check_lens_name` knows."""
    if name in NAMED:
        return NAMED[name](model)
    check_lens_name(name)
    if name in get_args(Kind):
        return default_lens(model, cast(Kind, name))
    return load_lens(name, model)


def check_lens_name(name: str) -> None:
    """Raise a ValueError if :func:`named_lens` cannot know the name."""
    if name in (*NAMED, "l-spade", "tuned"):
        return
    if not (Path(name).expanduser() / "lens.json").is_file():
        raise ValueError(
            f"There is no lens {name!r}. Expected {', '.join(NAMED)}, l-spade, tuned, or a folder "
            "with a lens.json, such as `spade-lens fit --out FOLDER` makes."
        )


@scoped
def fit_lens(
    model: Model,
    kind: Kind = "l-spade",
    *,
    text: TextSource = None,
    out: str | PathLike[str] | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> FittedLens:
    """Fit a lens and write it, its held-out figures and a picture of them.

    Writes into ``out``: ``lens.safetensors`` and ``lens.json`` (for
    :func:`~spade_lens.lenses.saving.load_lens`), ``held-out.csv``, and ``held-out.png`` and
    ``.pdf``. An interrupted fit goes on when it is called again with the same arguments.

    Args:
        model: The model.
        kind: ``"l-spade"`` or ``"tuned"``.
        text: What to learn from, as in :func:`spade_lens.fit`; by default the model writes it.
        out: The folder; by default :func:`lens_folder`, where ``spade-lens exit`` looks.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
        options: Of :func:`spade_lens.fit`, such as ``layers``, ``rank`` and ``passes``.

    Raises:
        ValueError: If hooks without a name are in force.
    """
    refuse_unnamed({"name": model.name, "hooks": hooks_of(model)}, f"The {kind} lens")
    place = output_folder(lens_folder(model, kind) if out is None else out)
    lens = fit(kind, model, text, checkpoint=place, **options)
    write_csv(place / "held-out.csv", lens.held_out)
    plots.save_figure(plots.plot(lens.held_out, "held_out", value=None), place / "held-out")
    lens.save(place)  # last: the lens is there only when all the rest is
    return lens


def held_out_text(held_out: pd.DataFrame) -> str:
    """Return held-out figures as text: a row for each layer, a column for each lens."""
    values = {
        "kl_to_spade": "KL to SPADE",
        "kl_to_model": "KL to the model",
        "agrees_with_spade": "agrees with SPADE",
        "agrees_with_model": "agrees with the model",
    }
    lenses = list(held_out["lens"].unique())
    columns = {
        f"{title}: {lens}": held_out[held_out["lens"] == lens].set_index("layer")[value]
        for value, title in values.items()
        for lens in lenses
        if not (value.endswith("spade") and lens == "SPADE")  # with itself
    }
    return pd.DataFrame(columns).round(2).to_string()
