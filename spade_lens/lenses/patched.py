"""What a patch changes: prompts read with it and without it, by the model's own answer.

This module knows the residual stream at layer ``n_layers`` only, not what a lens would read below.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import visible
from spade_lens.lazy import verb
from spade_lens.lenses.measures import Asked, readout_of
from spade_lens.lenses.readout import Readout
from spade_lens.models.hooks import numbered, rows_are
from spade_lens.models.model import Model
from spade_lens.models.patches import PatchesLike, check_patches
from spade_lens.models.residuals import capture
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.settings import Settings, limits, scoped
from spade_lens.storage.records import load_record, save_record

if TYPE_CHECKING:
    import pandas as pd

_RUNS = ("unpatched", "patched")
_TOP_K = 5


@dataclass(frozen=True, eq=False)
class Patched:
    """What the model answers to prompts without patches and with them.

    Args:
        readout: The answers; its two "lenses" are the unpatched and the patched run. ``agrees``
            and ``kl``, KL(unpatched || patched), compare with the unpatched run.
        target_logit: The logit of each prompt's target; NaN where there is none.
    """

    readout: Readout
    target_logit: Float[Tensor, "run prompt"]

    def __repr__(self) -> str:
        kept, kl = (x[1, 0].float().mean() for x in (self.readout.agrees, self.readout.kl))
        n = self.target_logit.shape[1]
        return visible(
            f"Patched({n} prompt{'s' * (n != 1)} of {self.readout.model}; top token kept "
            f"{kept:.0%}, mean KL(unpatched || patched) {kl:.3g})"
        )

    def to_frame(self) -> "pd.DataFrame":
        """Make a table with one row for every run and prompt.

        Returns:
            Columns ``model``, ``condition`` (``unpatched`` or ``patched``), ``prompt``,
            ``position``, ``agrees`` and ``kl``, both against the unpatched run, the top tokens
            as in :meth:`Readout.to_frame`, and ``target_logit`` where there are targets.
        """
        frame = self.readout.to_frame().rename(columns={"lens": "condition"}).drop(columns="layer")
        if "target" in frame:
            frame["target_logit"] = rearrange(self.target_logit, "run p -> (run p)").numpy()
        return frame

    def plot(self, **options: Any) -> Any:
        """Draw it; see :func:`spade_lens.plot`."""
        return verb("plot")(self, **options)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``patched.safetensors`` and ``patched.json``, and return the folder."""
        return save_record(self, folder, kind="patched")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Patched":
        """Return what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If one of the files is missing.
            ValueError: If the files are damaged or do not belong together.
        """
        return load_record(cls, folder, kind="patched", readout=Readout)


@scoped
@torch.no_grad()
def patch(
    prompts: PromptsLike, patches: PatchesLike, *, model: Model, settings: Settings | None = None
) -> Patched:
    """Run prompts without patches and with them, and compare what the model answers.

    Example:
        >>> write = sl.Patch(2, values=torch.zeros(32))  # at the last token of every prompt
        >>> sl.patch(["ab->", "cd->"], write, model=model).to_frame()["condition"].tolist()
        ['unpatched', 'unpatched', 'patched', 'patched']

    Args:
        prompts: A string, the messages of a chat, a prompt, or a list of these. They are read at
            their answer positions; a prompt's ``target`` and ``candidates`` are read where it has
            such.
        patches: A patch or several; see :class:`spade_lens.Patch`.
        model: The model.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The answers of both runs.

    Raises:
        TypeError: If prompts or patches are of a wrong type.
        ValueError: If there are no patches, or one does not fit the prompts.
    """
    prompts = model.prompts(prompts)
    patches = check_patches(model, prompts, patches)
    if not patches:
        raise ValueError("No patches were given. Give at least one.")
    at = [[prompt.answer] for prompt in prompts]
    with numbered(range(len(prompts))):
        runs = [
            capture(model, prompts, layers=model.n_layers, positions=at, patches=written).stack
            for written in ((), patches)
        ]
    finals = torch.stack(runs)  # [run 1 prompt d_model]
    rows = [
        (i, p.answer, -1 if p.target is None else p.target, p.shares_first_token, p.candidates)
        for i, p in enumerate(prompts)
    ]
    asked = Asked.of(rows, max(len(prompt.candidates) for prompt in prompts))
    readout = readout_of(
        model, finals, finals[0, 0], asked, lenses=_RUNS, layers=[model.n_layers], top_k=_TOP_K
    )
    return Patched(
        readout, torch.stack([_target_logits(model, run[0], asked.target) for run in runs])
    )


def _target_logits(
    model: Model, finals: Float[Tensor, "prompt d_model"], target: Tensor
) -> Float[Tensor, " prompt"]:
    """Return the logit of each prompt's target, a few rows of logits at a time."""
    parts = []
    at_once = limits(model).rows(4 * model.d_vocab)
    for first in range(0, len(finals), at_once):
        with rows_are(range(len(finals))[first : first + at_once]):
            logits = model.logits(finals[first : first + at_once])
        tokens = target[first : first + at_once].to(logits.device)
        chosen = logits.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
        parts.append(chosen.masked_fill(tokens < 0, torch.nan).cpu())
    return torch.cat(parts)
