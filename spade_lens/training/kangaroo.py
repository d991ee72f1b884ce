"""Train the adapter of Kangaroo: drafts from a lower layer that the model itself would write.

Source: Liu et al., Kangaroo (arXiv 2404.18911): soft cross-entropy between the model's own
next-token probabilities and the adapter's, both through the model's unembedding. The residuals at
the layer and at the top are computed once and kept in half precision. The residual at a position
predicts the model's prediction at that same position, as when drafting.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from os import PathLike
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import check_fields, check_number, checked
from spade_lens.generation.kangaroo import Adapter, Kangaroo, check_layer
from spade_lens.lenses.fitting.plan import SpadePlan
from spade_lens.lenses.fitting.ridge import Moments, ridge_maps, spectra
from spade_lens.lenses.fitting.rows import Rows
from spade_lens.lenses.fitting.text import CalibrationText, TextSource, calibration_text
from spade_lens.models.identity import identity_of
from spade_lens.models.model import Model
from spade_lens.models.unembedding import unembedding_of
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped
from spade_lens.training.frozen import frozen
from spade_lens.training.loop import train
from spade_lens.training.plan import TrainPlan
from spade_lens.training.streams import Batch, Streams

_D_HEAD = 64
_PASSES = 4
_HELD_OUT = 0.05
_ROWS = 1024
"""Tokens of which sums are added at once."""
_MOST_CHOOSING = 20_000
"""Tokens that choose the ridge at most."""


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter is made of, and what it learns from at a step.

    Args:
        residual: The residual path: ``"affine"``, a map that starts as the ridge regression of the
            last residual; ``"ridge"``, the same, which stays as it is; or ``"diagonal"``, close to
            the paper's.
        hidden: The width of a feed-forward part; 0 for none, as in the paper.
        vocabulary: Draft only so many tokens, the commonest of the text, and those of the prompt;
            None for all.
        batch_tokens: About how many tokens a step trains on.

    Raises:
        TypeError: If a number is of a wrong type.
        ValueError: If one is out of range.
    """

    residual: Literal["affine", "ridge", "diagonal"] = "affine"
    hidden: int = 0
    vocabulary: int | None = None
    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("hidden", self.hidden, least=0)
        check_number("batch_tokens", self.batch_tokens, least=1)
        if self.vocabulary is not None:
            check_number("vocabulary", self.vocabulary, least=1)


@scoped
@checked
def train_kangaroo(
    model: Model,
    layer: int,
    text: TextSource = None,
    *,
    adapter: AdapterPlan | None = None,
    plan: TrainPlan | None = None,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Kangaroo:
    """Train an adapter that drafts from a layer, on text that should be the model's own.

    A twentieth of the documents, at least one, is held out, and chooses nothing.
    ``about["held_out"]`` of the result says how good the adapter is there: ``agreement`` is how
    often its likeliest token is the model's (the acceptance of greedy drafts), ``overlap`` is the
    mean of sum min(p, q) (that of sampled ones).

    Example:
        >>> from spade_lens.training import TrainPlan, train_kangaroo
        >>> text = ["abcdefgh" * 9, "ijklmnop" * 9, "qrstuvwx" * 9]
        >>> train_kangaroo(model, 2, text, plan=TrainPlan(20, warmup=2))
        Kangaroo(layer=2)

    Args:
        model: The model. Its weights stay as they are.
        layer: The layer to draft from, from 1 to ``n_layers - 1``.
        text: What to learn from; see
            :func:`~spade_lens.lenses.fitting.text.calibration_text`. By default the model writes
            it; :func:`own_text` lets it write after prompts of yours.
        adapter: What it is made of.
        plan: How to train; by default four passes over the text.
        checkpoint: A folder to go on from; see :func:`train`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`. The
            residuals of the text must fit the memory limit, in half precision.

    Returns:
        The adapter, a drafter for :class:`spade_lens.generation.Speculate`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, the text has fewer than two documents, or its
            residuals take more than the memory limit, or those to learn from, or those held out,
            have single tokens alone.
        FloatingPointError: If a loss is not finite.
    """
    check_layer(model, layer)
    pieces = calibration_text(model, text)
    # The residual of a text's first token is like no other, so a text needs a second one.
    learned, held_out = ([p for p in part if len(p) > 1] for part in _split(pieces))
    if not learned or not held_out:
        raise ValueError(
            f"Of the documents, {len(learned)} to learn from and {len(held_out)} held out have two "
            "tokens or more; expected at least one of each. Give longer texts."
        )
    # At once, so that the memory limit holds for both together.
    streams = Streams.of(model, layer, [*learned, *held_out])
    return fit_adapter(
        *(model, layer, *streams.split(len(learned))),
        AdapterPlan() if adapter is None else adapter,
        plan,
        checkpoint=checkpoint,
        about={"text": {**pieces.about, "sha256": pieces.sha256}},
    )


@scoped
def fit_adapter(
    model: Model,
    layer: int,
    learned: Streams,
    held_out: Streams,
    made: AdapterPlan,
    plan: TrainPlan | None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Kangaroo:
    """Train an adapter on residuals that are known; the rest is as in :func:`train_kangaroo`."""
    if plan is None:
        steps = max(20, round(_PASSES * learned.n_tokens / made.batch_tokens))
        plan = TrainPlan(steps, warmup=min(100, steps // 5))
    if plan.patience is not None:
        raise ValueError(
            f"patience={plan.patience} was given; expected None: the held-out documents only "
            "measure, and would choose when to stop."
        )
    ids = None if made.vocabulary is None else commonest(learned.pieces, made.vocabulary)
    ids = None if ids is None else ids.to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        module = start_adapter(model, learned, made)
    facts = dict(about or {}) | {"adapter": asdict(made), "layer": layer}
    facts |= {"model": identity_of(model)}  # as it is now: it may be another one when it is saved

    head = _head(model, ids)

    def loss(step: int) -> Tensor:
        return _loss(model, module, head, learned.get(learned.draw(made.batch_tokens)))

    def validate() -> float:
        losses = [_loss(model, module, head, batch) for batch in held_out]
        return float(torch.stack(losses).mean())

    with frozen(model):
        history = train(
            module,
            loss,
            plan,
            validate=validate,
            checkpoint=checkpoint,
            about=facts,
        )
    module = module.to(model.dtype).eval().requires_grad_(False)
    trained = Kangaroo(model, layer, module, ids, facts)
    rates = torch.cat(
        [torch.stack(each) for _, *each in compare_predictions(trained, held_out)], dim=1
    )
    agreement, overlap = rates.double().mean(dim=1).tolist()
    measured = {"tokens": rates.shape[1], "agreement": agreement, "overlap": overlap}
    facts |= {
        "plan": asdict(plan),
        "tokens": learned.n_tokens,
        "held_out": measured,
        "history": history.to_dict("list"),
    }
    return trained


@torch.no_grad()
def compare_predictions(
    kangaroo: Kangaroo, streams: Streams
) -> Iterator[tuple[int, Float[Tensor, " pos"], Float[Tensor, " pos"]]]:
    """Compare an adapter's predictions with the model's, from the second token of every text on.

    Yields:
        (number of the text, whether the likeliest tokens are the same, sum min(p, q)).
    """
    model, ids = kangaroo.model, kangaroo.ids
    head = _head(model, ids)
    for batch in streams:
        hidden = kangaroo.adapter(batch.low.to(model.dtype), batch.positions)
        for row, piece in enumerate(batch.pieces):
            real = batch.valid[row]
            wanted = model.logits(batch.top[row, real].to(model.dtype))
            drafted = torch.full_like(wanted, -torch.inf)
            drafted[:, slice(None) if ids is None else ids] = head(hidden[row, real])
            same = drafted.argmax(dim=-1) == wanted.argmax(dim=-1)
            overlap = torch.minimum(drafted.softmax(dim=-1), wanted.softmax(dim=-1)).sum(dim=-1)
            yield piece, same.float(), overlap


def _head(model: Model, ids: Int[Tensor, " ids"] | None) -> Callable[[Tensor], Tensor]:
    """Return what gives the logits of the tokens that may be drafted, of residuals at the top."""
    if ids is None:
        return model.logits
    linear = unembedding_of(model, ids)
    if linear is None:
        return lambda hidden: model.logits(hidden)[:, ids]
    return lambda hidden: linear(model.final_norm(hidden)).float()


def commonest(pieces: Sequence[Prompt], n: int) -> Int[Tensor, " ids"]:
    """Return the commonest tokens of texts, ascending; fewer if there are fewer."""
    counts = Counter(token for piece in pieces for token in piece.tokens)
    return torch.tensor(sorted(token for token, _ in counts.most_common(n)))


def start_adapter(model: Model, learned: Streams, made: AdapterPlan) -> Adapter:
    """Return an adapter whose attention adds nothing yet; a map is the ridge regression.

    The last twentieth of the tokens chooses how strong the ridge is, and the others fit the map.
    """
    width = model.d_model
    heads = [n for n in range(max(1, width // _D_HEAD), 0, -1) if width % (2 * n) == 0]
    if not heads:
        raise ValueError(f"{model.name} has width {width}; expected an even one, for rotations.")
    adapter = Adapter(width, heads[0], linear=made.residual != "diagonal", hidden=made.hidden).to(
        model.device
    )
    fitted, choosing = _rows_of(learned)
    moments = Moments.none(1, width, model.device)
    for rows in fitted.split(_ROWS):
        moments.add(learned.low[rows][None], learned.top[rows][None])
    [problem] = spectra(moments)
    with torch.no_grad():
        mean, scale = problem.mean_x.float(), problem.scale.float()
        # All coordinates count alike at first, though some have far larger residuals than others.
        adapter.norm.weight.copy_((mean.square() + scale.square()).mean().sqrt() / scale)
        if isinstance(adapter.path, torch.nn.Linear):
            top = learned.top[choosing].float()
            rows_to_choose = Rows(learned.low[choosing].float()[None], top, None)
            maps, _ = ridge_maps([problem], (0,), SpadePlan(), rows_to_choose)
            whole = maps.up[0] + torch.eye(width, device=model.device)
            adapter.mean.copy_(mean)
            adapter.scale.copy_(scale)
            adapter.path.weight.copy_(whole * scale)
            adapter.path.bias.copy_(whole @ mean + maps.bias[0])
            adapter.path.requires_grad_(made.residual == "affine")
    return adapter


def _rows_of(learned: Streams) -> tuple[Int[Tensor, " fitted"], Int[Tensor, " choosing"]]:
    """Return the tokens that a map is fitted to, and those that choose its ridge.

    The first token of a text is neither, since its residual is like no other.
    """
    lengths = [len(piece) for piece in learned.pieces]
    starts = [0, *accumulate(lengths)][:-1]
    rows = torch.ones(learned.n_tokens, dtype=torch.bool, device=learned.low.device)
    rows[starts] = False
    [places] = rows.nonzero(as_tuple=True)
    n_choosing = min(_MOST_CHOOSING, max(1, round(_HELD_OUT * len(places))))
    at = max(1, len(places) - n_choosing)
    return places[:at], places[min(at, len(places) - 1) :]  # one token alone is both


def _loss(
    model: Model, adapter: Adapter, head: Callable[[Tensor], Tensor], batch: Batch
) -> Float[Tensor, ""]:
    """Return the soft cross-entropy of a batch, in nats a token."""
    dtype = model.dtype
    hidden = adapter(batch.low, batch.positions)[batch.valid]
    drafted = head(hidden.to(dtype))
    with torch.no_grad():
        wanted = head(batch.top[batch.valid].to(dtype)).softmax(dim=-1)
    return -(wanted * drafted.log_softmax(dim=-1)).sum(dim=-1).mean()


def _split(text: CalibrationText) -> tuple[list[Prompt], list[Prompt]]:
    """Split texts by document: what is learned from, and the last twentieth."""
    documents = list(dict.fromkeys(text.document))
    if len(documents) < 2:
        raise ValueError(
            f"The text has {len(documents)} document; expected at least two, since whole documents "
            "are held out. Give more."
        )
    kept = set(documents[: -max(1, round(_HELD_OUT * len(documents)))])
    parts: tuple[list[Prompt], list[Prompt]] = ([], [])
    for piece, document in zip(text.pieces, text.document, strict=True):
        parts[document not in kept].append(piece)
    return parts
