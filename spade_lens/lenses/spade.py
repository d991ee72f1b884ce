"""SPADE: run a few kept tokens, as a sequence of their own, through the remaining layers.

All layers are read in one climb: block k sees the kept tokens of every layer up to k as one
batch, so no block runs twice. The start token's keys and values depend on nothing but the start
token, so they are taken from a run of it alone wherever the captured start token is indeed that.
This module does not know what is read off its residuals.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import checked, plain_name, whole_numbers
from spade_lens.lenses.keep import Keep, KeepRule, name_of
from spade_lens.lenses.lens import Reading
from spade_lens.models.backbone import KeyValueCache, Prefix
from spade_lens.models.hooks import rows_are, side_by_side
from spade_lens.models.model import Model
from spade_lens.models.places import check_layers, pad_after
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import limits, one_call


class Spade:
    """The SPADE lens (SPace Alignment DEcoding).

    The residuals at layer l of only the start token and the answer token go through the rest of
    the network, and the answer is read there.

    Source: Zheng, Ma, Lin, Yang 2025 (arXiv 2507.17618; since its second version the method is
    called SimLens). What the paper's abstract leaves open is an argument here, and the default is
    our choice: which tokens are kept, and whether they keep their positions.

    Example:
        >>> Spade(model)  # start token and answer token
        Spade(model)
        >>> Spade(model, keep=Keep(start=False)).name  # the answer token alone
        'SPADE (answer)'
        >>> Spade(model, keep=Keep(last=4))
        Spade(model, keep=Keep(last=4))

    Args:
        model: The model to read.
        keep: Which tokens are kept: a :class:`Keep`, or any function of (prompt, answer
            position). The reading is taken at the last of them. Ours: the answer token is the
            last token of the prompt, whose next token is asked for.
        positions: ``"keep"``: the tokens keep the positions they have in the prompt.
            ``"reset"``: they are numbered 0, 1, 2, ... Only the blocks that run see the new
            numbers: in a model with learned position embeddings a residual above layer 0 has
            its old position in it for good. Ours: the default is ``"keep"``.
        name: What tables and figures call it.

    Raises:
        TypeError: If ``keep`` cannot be called.
        ValueError: If ``positions`` is neither.
    """

    @checked
    def __init__(
        self,
        model: Model,
        *,
        keep: KeepRule | None = None,
        positions: Literal["keep", "reset"] = "keep",
        name: str | None = None,
    ) -> None:
        if keep is not None and not callable(keep):
            raise TypeError(
                f"keep={keep!r} was given; expected Keep(...), for example "
                "Keep(spans=('labels',)), or a function of (prompt, answer position)."
            )
        self.model = model
        self.rule: KeepRule = Keep() if keep is None else keep
        self.positions = positions
        self.name = plain_name(name or _name(self.rule, positions), "a lens")

    def __repr__(self) -> str:
        # A function is pasted back by its name.
        rule = getattr(self.rule, "__name__", repr(self.rule))
        keep = "" if self.rule == Keep() else f", keep={rule}"
        positions = "" if self.positions == "keep" else f", positions={self.positions!r}"
        own_name = self.name != _name(self.rule, self.positions)
        return f"Spade(model{keep}{positions}{f', name={self.name!r}' if own_name else ''})"

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """Return the kept positions, ascending.

        Raises:
            TypeError: If the keep rule does not give whole numbers.
            ValueError: If there are none, or one lies outside 0 to ``answer``.
        """
        name = f"The keep rule {name_of(self.rule)!r}: "
        expected = f"at least one position from 0 to the answer token's, {answer}"
        given = self.rule(prompt, answer)
        kept = whole_numbers(given, name, expected, below=answer + 1, distinct=False)
        return tuple(sorted(set(kept)))

    @one_call()
    @torch.no_grad()
    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """Return the residual at layer ``n_layers`` of the last kept token, by starting layer.

        Raises:
            ValueError: If the layers are not ascending.
        """
        model, layers = self.model, check_layers(self.model, layers, rising=True)
        out = torch.empty(
            len(layers), len(readings), model.d_model, dtype=model.dtype, device=model.device
        )
        for start_token, group in self._groups(residuals, readings, layers):
            prefix = None if start_token is None else model.prefix(start_token)
            # The start token is in the prefix, so it does not run again.
            skip = 0 if prefix is None else 1
            kept = [readings[i].keep[skip:] for i in group]
            at_once = max(
                1, 2 * limits(model).batch_tokens // (len(layers) * max(len(k) for k in kept))
            )
            for first in range(0, len(group), at_once):
                part = slice(first, first + at_once)
                of = [readings[i].prompt for i in group[part]]
                # Hooks expect one row for each prompt, so that with them no layer joins another.
                apart = (
                    [layers] if model.batching == "any lengths" else [[layer] for layer in layers]
                )
                out[:, group[part]] = torch.cat(
                    [self._climb(residuals, of, kept[part], some, prefix) for some in apart]
                )
        return out

    def _climb(
        self,
        residuals: Residuals,
        prompts: Sequence[int],
        kept: Sequence[Sequence[int]],
        layers: Sequence[int],
        prefix: Prefix | None,
    ) -> Float[Tensor, "layer row d_model"]:
        """Run every row's kept tokens from every layer to the last, one block at a time."""
        model, n_rows = self.model, len(kept)
        # Padding repeats a row's last token after its end, where nothing looks.
        slots = pad_after(
            [residuals.slots(i, k) for i, k in zip(prompts, kept, strict=True)], model.device
        )
        positions = self._positions(kept, slots, reset_from=0 if prefix is None else 1)
        lengths = [len(k) for k in kept]
        answer = torch.tensor(lengths, device=model.device) - 1
        cache = None if prefix is None else KeyValueCache(prefix.cached)
        climbing: Float[Tensor, "row pos d_model"] = residuals.stack.new_empty(
            0, slots.shape[1], model.d_model
        )
        stops = [*layers[1:], model.n_layers]
        for layer, stop in zip(layers, stops, strict=True):
            if layer == 0 and self.positions == "reset":
                tokens = [
                    [residuals.prompts[i].tokens[p] for p in k]
                    for i, k in zip(prompts, kept, strict=True)
                ]
                with rows_are(prompts, lengths):
                    joining = model.embed(pad_after(tokens, model.device), positions)
            else:
                joining = residuals.layer(layer)[slots]
            climbing = torch.cat([climbing, joining])
            n_joined = len(climbing) // n_rows
            at = positions.repeat(n_joined, 1)
            with rows_are([*prompts] * n_joined, lengths * n_joined):
                climbing = model.run_blocks(climbing, at, layer, stop, cache=cache)
        by_layer = climbing.unflatten(0, (len(layers), n_rows))
        return by_layer[:, torch.arange(n_rows, device=model.device), answer]

    def _positions(
        self, kept: Sequence[Sequence[int]], slots: Int[Tensor, "row pos"], *, reset_from: int
    ) -> Int[Tensor, "row pos"]:
        if self.positions == "reset":
            n = slots.shape[1]
            return torch.arange(reset_from, reset_from + n, device=slots.device).expand_as(slots)
        return pad_after(kept, slots.device)

    def _groups(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Iterator[tuple[int | None, list[int]]]:
        """Readings (by index) that share a reusable start token; None for those without."""
        if self.model.hooked:  # nothing is reused
            for alike in side_by_side(self.model, [len(reading.keep) for reading in readings]):
                yield None, alike
            return
        groups: dict[int | None, list[int]] = {}
        for i, reading in enumerate(readings):
            start = None
            # A start token that is itself read has nothing to be put before.
            if reading.keep[0] == 0 and len(reading.keep) > 1:
                start = residuals.prompts[reading.prompt].tokens[0]
            groups.setdefault(start, []).append(i)
        for start, group in groups.items():
            if start is not None and not self._reusable(residuals, readings, group, start, layers):
                start = None
            yield start, group

    def _reusable(
        self,
        residuals: Residuals,
        readings: Sequence[Reading],
        group: Sequence[int],
        start: int,
        layers: Sequence[int],
    ) -> bool:
        """Whether the captured start tokens are what the start token alone gives.

        They are not where a patch or a hook has changed them.
        """
        prefix = self.model.prefix(start) if residuals.start_is_pure else None
        if prefix is None:
            return False
        prompts = {readings[i].prompt for i in group}
        slots = [residuals.slots(i, [0])[0] for i in prompts]
        captured = torch.stack([residuals.layer(layer)[slots] for layer in layers])
        alone = prefix.resid[list(layers)][:, None]
        error = (captured - alone).norm(dim=-1)
        rounding = 3e-2 if torch.finfo(self.model.dtype).bits < 32 else 1e-4
        return bool((error <= rounding * alone.norm(dim=-1)).all())


def _name(rule: KeepRule, positions: str) -> str:
    kept = name_of(rule)
    reset = ", reset" if positions == "reset" else ""
    return "SPADE" + (f" ({kept}{reset})" if kept != "start+answer" or reset else "")
