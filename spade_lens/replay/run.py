"""Patched runs that start at the patched layer, from residuals that were captured once.

A *row* is one run of one prompt under some patches. Thousands of rows share the prompts' captured
residuals. A row runs only the blocks above its lowest patch, and there only some tokens. Tokens
before the first patched position are as captured, and tokens that are overwritten at every layer
are given by the patch. The others attend to their keys and values; they do not run. Shared
prefixes run once, and the last block runs only what is read.

This module knows prompts and patches, not tasks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import SupportsIndex
from weakref import WeakSet

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import whole_numbers
from spade_lens.models.backbone import AfterBlock, CachedTokens, KeyValueCache
from spade_lens.models.cache import join_tokens, select_tokens
from spade_lens.models.hooks import numbered, rows_are, side_by_side
from spade_lens.models.model import Model
from spade_lens.models.patches import PatchesLike, Place, Writes
from spade_lens.models.places import LayersLike, pad_after
from spade_lens.models.residuals import Residuals, capture, still_gives
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.replay.key_store import KeyStore
from spade_lens.replay.prefix_tree import RowPath, Segment, batches, find_segments, whole_rows
from spade_lens.settings import Settings, limits, one_call, progress_bar, scoped

_FRESH = "captured in this call"


@scoped
@torch.no_grad()
def replay(
    model: Model,
    residuals: Residuals,
    rows: SupportsIndex | Iterable[SupportsIndex],
    patches: PatchesLike,
    *,
    settings: Settings | None = None,
) -> Float[Tensor, "row d_model"]:
    """Return the residual at layer ``n_layers`` and the answer position of every row.

    The result is that of ``capture(model, [prompts[i] for i in rows], patches=patches)``.

    Example:
        >>> residuals = capture_for_replay(model, prompts)
        >>> write = Patch(2, prompts=1, positions=0, values=residuals.at(0)[2, 3])
        >>> replay(model, residuals, [0, 0, 1], [write]).shape
        torch.Size([3, 32])

    Args:
        model: The model.
        residuals: Of the prompts, from :func:`capture_for_replay`.
        rows: The prompt of every row, as an index into ``residuals.prompts``.
        patches: Writes to the residual stream. A patch's ``prompts`` are *rows* here. Of several
            at one layer, the later ones see what the earlier ones wrote.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If a row is no whole number.
        ValueError: If there are no rows, a row names an unknown prompt, a patch does not fit, no
            layer at or below a row's lowest patch was captured, the model no longer gives these
            residuals, or hooks act that did not when they were captured.
    """
    n = len(residuals.prompts)
    rows = whole_numbers(
        rows, "rows=", f"the prompt of every row, from 0 to {n - 1}", below=n, distinct=False
    )
    writes = Writes(model, [residuals.prompts[i] for i in rows], patches)
    starts = _starts(model, residuals, len(rows), writes)
    for i in set(rows):  # refuses what was not captured
        residuals.slots(i, range(residuals.prompts[i].answer + 1))
    _refuse_stale(model, residuals, rows)
    paths, equal_rows = _paths(model, residuals, rows, writes)
    key_bytes = _key_bytes(model)
    out = torch.empty(len(rows), model.d_model, dtype=model.dtype, device=model.device)
    with progress_bar(total=len(rows), desc="replay", unit="row", model=model) as bar:
        for start, part in _parts(model, paths, starts):
            captured = set(range(start, model.n_layers)) <= set(residuals.layers)
            runs = _Runs(
                model,
                residuals,
                rows,
                writes,
                {row: paths[row] for row in part},
                start,
                key_bytes if captured else None,
            )
            for group, most in runs.groups(limits(model).memory_bytes):
                store = KeyStore(group, model.device)
                for batch in batches(
                    group,
                    runs.cost,
                    most=most,
                    most_tokens=limits(model).batch_tokens,
                    in_order=model.hooked,
                ):
                    ends, final = runs.run(batch, store)
                    for row, resid in zip(ends, final, strict=True):
                        out[equal_rows[row]] = resid
                        bar.update(len(equal_rows[row]))
    return out


@scoped
def capture_for_replay(
    model: Model,
    prompts: PromptsLike,
    *,
    layers: LayersLike = None,
    settings: Settings | None = None,
) -> Residuals:
    """Capture residuals, up to the answer positions, from which patched runs can start.

    Args:
        model: The model.
        prompts: The prompts.
        layers: The layers that patches will be made at; all by default. With fewer, a run starts
            at the next one below its lowest patch.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: As :func:`spade_lens.capture` does.
    """
    prompts = model.prompts(prompts)
    positions = [range(prompt.answer + 1) for prompt in prompts]
    with numbered(range(len(prompts))), one_call() as call:
        residuals = capture(model, prompts, layers=layers, positions=positions)
        call.kept.setdefault(_FRESH, WeakSet()).add(residuals)
        return residuals


def _refuse_stale(model: Model, residuals: Residuals, rows: Sequence[int]) -> None:
    """Raise if the model has changed since the capture, by capturing the shortest prompt again.

    Residuals of this same call are not looked at, and with hooks nothing is run for a look.
    """
    if model.hooked and residuals.start_is_pure:
        raise ValueError(
            f"Hooks act on {model.name}, and the residuals were captured without them. Capture "
            "them where the same hooks act: inside model.hooks(...)."
        )
    with one_call() as call:
        if model.hooked or residuals in call.kept.get(_FRESH, ()):
            return
    i = min(rows, key=lambda row: len(residuals.prompts[row]))
    prompt, top = residuals.prompts[i], max(residuals.layers)
    [slot] = residuals.slots(i, [prompt.answer])
    known = residuals.layer(top)[slot]
    if not still_gives(model, known, prompt, layer=top, position=prompt.answer):
        raise ValueError(
            f"The residuals of prompt {i} are not what {model.name} gives now: it has been changed "
            "since they were captured, or they are another model's. Capture them again."
        )


def _paths(
    model: Model, residuals: Residuals, rows: Sequence[int], writes: Writes
) -> tuple[dict[int, tuple[int, ...]], dict[int, list[int]]]:
    """Group identical rows: one token path per distinct row, and the rows that share it.

    Tokens and values are compared, not prompts and patches. So two queries after the same
    demonstrations share the demonstrations. Hooks may tell rows apart, so with them none is shared.
    """
    numbers: dict[tuple[object, ...], int] = {}
    paths: dict[int, tuple[int, ...]] = {}
    equal_rows: dict[int, list[int]] = {}
    first_row: dict[int, int] = {}
    for row, i in enumerate(rows):
        prompt, path = residuals.prompts[i], [-row if model.hooked else 0]
        for position, token in enumerate(prompt.tokens[: prompt.answer + 1]):
            step = (path[-1], token, writes.content(row, position))
            path.append(numbers.setdefault(step, len(numbers) + 1))
        first = first_row.setdefault(path[-1], row)
        paths.setdefault(first, tuple(path[1:]))
        equal_rows.setdefault(first, []).append(row)
    return paths, equal_rows


def _parts(
    model: Model, paths: Mapping[int, Sequence[int]], starts: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the rows that start at one layer, and that layer; with hooks, in the rows' order."""
    if not model.hooked:
        for start in sorted(set(starts)):
            yield start, [row for row in paths if starts[row] == start]
        return
    for start, alike in groupby(paths, key=lambda row: starts[row]):
        rows = list(alike)
        for together in side_by_side(model, [len(paths[row]) for row in rows]):
            yield start, [rows[n] for n in together]


def _key_bytes(model: Model) -> int | None:
    """Return the bytes of a token's keys and values in one block; None where there are none."""
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    resid = torch.zeros(1, 1, model.d_model, dtype=model.dtype, device=model.device)
    tokens = model.cached_tokens(one, lambda _: resid)
    return None if tokens is None else sum(x.nbytes for x in tokens.keys_values(0))


@dataclass(frozen=True)
class _Runs:
    """The runs of all rows that start at one layer.

    ``key_bytes`` are those of a token's keys and values in one block; None if all of a row must
    run.
    """

    model: Model
    residuals: Residuals
    rows: Sequence[int]
    writes: Writes
    paths: Mapping[int, tuple[int, ...]]
    start: int
    key_bytes: int | None

    def groups(self, budget: float) -> list[tuple[list[Segment], float]]:
        """Return groups to run one after the other, and the bytes that a batch of each may take."""
        running = {row: RowPath(path, self._running(row)) for row, path in self.paths.items()}
        if self.key_bytes is None:
            return [(whole_rows(running), budget)]
        each = max(1, self.key_bytes * (self.model.n_layers - self.start))
        groups = find_segments(running, most_shared=int(budget / 2 / each))
        return [(group, budget / 2) for group in groups]

    def cost(self, segment: Segment) -> float:
        """Estimate the bytes that a segment takes in a batch."""
        # As in capture(): some residuals and an MLP for every token, in the model's dtype, and
        # scores for every pair of tokens. Cached tokens have keys and values, which are selected,
        # joined and repeated for every head.
        width = self.model.d_model * (torch.finfo(self.model.dtype).bits // 8)
        n, seen = len(segment.positions), segment.positions[-1] + 1
        return n * (32 * width + 32 * seen) + 8 * width * (seen - n)

    def run(
        self, batch: Sequence[Segment], store: KeyStore
    ) -> tuple[list[int], Float[Tensor, "end d_model"]]:
        """Run a batch of segments; return the rows that end with it and their final residuals."""
        model, n_layers = self.model, self.model.n_layers
        # Padding repeats a segment's last token after its end, where causal attention never looks.
        slots = [self._slots(segment.row, segment.positions) for segment in batch]
        at = pad_after([segment.positions for segment in batch], model.device)
        after_block = self._writing([(segment.row, segment.positions) for segment in batch])
        resid = self._captured(self.start, pad_after(slots, model.device))
        patched = after_block(self.start, resid)
        resid = resid if patched is None else patched
        ends = [place for place, segment in enumerate(batch) if segment.is_end]
        last = [len(batch[place].positions) - 1 for place in ends]
        numbers = [batch[place].row for place in ends]
        if self.key_bytes is None or self.start == n_layers:
            lengths = [len(segment.positions) for segment in batch]
            with rows_are([segment.row for segment in batch], lengths):
                resid = model.run_blocks(resid, at, self.start, n_layers, after_block=after_block)
            return numbers, resid[ends, last]
        top, storing = n_layers - 1, store.storing(batch)
        resid = model.run_blocks(
            resid,
            at,
            self.start,
            top,
            cache=KeyValueCache(
                join_tokens(self._captured_tokens(batch), store.before(batch)), storing
            ),
            after_block=after_block,
        )
        # In the last block only the answers run. Of the other tokens it needs keys and values.
        tokens = model.cached_tokens(at, lambda _: resid)
        assert tokens is not None
        keys, values = tokens.keys_values(top)
        if storing is not None:
            storing(top, keys, values)
        if not ends:
            return [], resid[:0, 0]
        reading = [batch[place] for place in ends]
        resid = model.run_blocks(
            resid[ends, last][:, None],
            at[ends, last][:, None],
            top,
            n_layers,
            cache=KeyValueCache(
                join_tokens(
                    self._captured_tokens(reading),
                    store.before(reading),
                    CachedTokens(at[ends], lambda _: (keys[ends], values[ends])),
                )
            ),
            after_block=self._writing([(s.row, s.positions[-1:]) for s in reading]),
        )
        return numbers, resid[:, 0]

    def _running(self, row: int) -> tuple[int, ...]:
        """Return the positions of a row that have to run."""
        answer = len(self.paths[row]) - 1
        if self.key_bytes is None:
            return tuple(range(answer + 1))
        layers = set(range(self.start, self.model.n_layers))
        first = min([*self.writes.positions(row), answer])
        return (
            *(p for p in range(first, answer) if not layers <= self.writes.replaced(row, p)),
            answer,
        )

    def _captured_tokens(self, batch: Sequence[Segment]) -> CachedTokens | None:
        """Return the tokens before a batch's last ones that never run."""
        index: dict[tuple[object, ...], int] = {}
        places: list[tuple[int, int]] = []
        wanted: list[list[int]] = []
        for segment in batch:
            running = set(self._running(segment.row))
            wanted.append([])
            for position in range(segment.positions[-1]):
                if position in running:
                    continue
                # As captured, or given by what is written, whichever the prompt.
                content = self.writes.content(segment.row, position)
                token = (position, content) if content else (position, self.rows[segment.row])
                if token not in index:
                    index[token] = len(places)
                    places.append((segment.row, position))
                wanted[-1].append(index[token])
        if not places:
            return None
        device = self.model.device
        slots = torch.tensor([self._slots(row, [p])[0] for row, p in places], device=device)
        write = self._writing([(row, (position,)) for row, position in places])

        def resid_at(layer: int) -> Tensor:
            resid = self._captured(layer, slots[:, None])  # [cached 1 d_model]
            patched = write(layer, resid)
            resid = resid if patched is None else patched
            return rearrange(resid, "cached 1 d_model -> 1 cached d_model")

        positions = torch.tensor([[position for _, position in places]], device=device)
        cached = self.model.cached_tokens(positions, resid_at)
        assert cached is not None
        return select_tokens(cached, wanted)

    def _writing(self, places: Sequence[Place]) -> AfterBlock:
        plan = self.writes.plan(places)
        return lambda layer, resid: self.writes.write(resid, plan, layer)

    def _slots(self, row: int, positions: Sequence[int]) -> list[int]:
        return self.residuals.slots(self.rows[row], positions)

    def _captured(self, layer: int, slots: Tensor) -> Tensor:
        stack = self.residuals.layer(layer)
        return stack[slots.to(stack.device)].to(self.model.device)


def _starts(model: Model, residuals: Residuals, n_rows: int, writes: Writes) -> list[int]:
    """Return, for every row, the highest captured layer at or below its lowest patch."""
    starts = []
    for row in range(n_rows):
        lowest = writes.lowest_layer(row)
        lowest = model.n_layers if lowest is None else lowest
        below = [layer for layer in residuals.layers if layer <= lowest]
        if not below:
            raise ValueError(
                f"A run patched at layer {lowest} needs residuals of that layer or one below; "
                f"only {list(residuals.layers)} were captured. Add it to layers= of "
                "capture_for_replay()."
            )
        starts.append(max(below))
    return starts
