"""Descent on the Kullback-Leibler divergence of what a linear lens reads from what it should.

Adam moves the maps in coordinates in which every layer's residuals have mean zero and next to no
correlations. In their own coordinates the few directions that are hundreds of times larger than
the rest keep the step so small that the rest hardly moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.fitting.held_out import log_probs
from spade_lens.lenses.fitting.ridge import Spectrum
from spade_lens.lenses.fitting.rows import Places, Rows, rows_at
from spade_lens.lenses.linear import AffineMaps
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import Checkpoint

_ROWS_AT_ONCE = 64
"""Rows of one step: more of them point better, fewer let it step more often."""

_WARM_UP = 10
"""Steps over which the rate rises: Adam's first steps have all the same size."""


_BETAS = (0.9, 0.98)
_FLOOR = 0.1
"""Correlations' eigenvalues (1 on average) below this are not blown up to full size."""


@dataclass(frozen=True)
class Course:
    """What a descent goes by.

    Args:
        passes: How often the text is gone through.
        rate: The size of a step, relative to that of a final residual.
        seed: Of the order of the rows.

    Raises:
        ValueError: If there is no pass or the rate is not positive.
    """

    passes: int
    rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.passes < 1 or not 0 < self.rate < float("inf"):
            raise ValueError(
                f"{self.passes} passes at a rate of {self.rate} were asked for; expected at least "
                "one pass and a rate above 0."
            )

    def turns(self, places: Places) -> list[Places]:
        """Every pass's batches, in the order in which they are taken."""
        draws = torch.Generator().manual_seed(self.seed)
        turns: list[Places] = []
        for _ in range(self.passes):
            order = torch.randperm(len(places.pieces), generator=draws).tolist()
            shuffled = Places(
                tuple(places.pieces[i] for i in order), tuple(places.positions[i] for i in order)
            )
            turns += shuffled.batches()
        return turns


@dataclass(frozen=True)
class _State:
    """What has been learned, and Adam's moments of it, all changed in place.

    ``weight`` is added to ``A`` (to ``down`` where there is one) in white coordinates.
    """

    weight: Float[Tensor, "layer inner d_model"]
    bias: Float[Tensor, "layer d_model"]
    weight_m: Float[Tensor, "layer inner d_model"]
    weight_v: Float[Tensor, "layer inner d_model"]
    bias_m: Float[Tensor, "layer d_model"]
    bias_v: Float[Tensor, "layer d_model"]
    turn: Tensor
    step: Tensor

    @staticmethod
    def at(maps: AffineMaps) -> "_State":
        like = maps.up if maps.down is None else maps.down
        counters = [torch.zeros((), dtype=torch.long) for _ in range(2)]
        weights = [torch.zeros_like(like) for _ in range(3)]
        biases = [torch.zeros_like(maps.bias) for _ in range(3)]
        return _State(weights[0], biases[0], *weights[1:], *biases[1:], *counters)


@scoped
def descend(
    model: Model,
    maps: AffineMaps,
    problems: Sequence[Spectrum],
    places: Places,
    spade: Spade | None,
    course: Course,
    checkpoint: Checkpoint,
    *,
    settings: Settings | None = None,
) -> AffineMaps:
    """Maps that have gone downhill from the ones given.

    Args:
        model: The model.
        maps: Where to start.
        problems: The residuals' means and correlations at every layer.
        places: What to learn from; residuals are computed again in every pass, not stored.
        spade: The SPADE that is to be met; None where it is the model itself.
        course: How to go.
        checkpoint: Where the descent's stand is kept.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        FloatingPointError: If a map becomes NaN or infinite.
    """
    mean = torch.stack([p.mean_x for p in problems]).float()
    whiten = torch.stack([p.whiten(_FLOOR) for p in problems]).float()
    state = _State.at(maps)
    saved = checkpoint.load("descent", model.device)
    if saved is not None:
        state = _State(**saved)
    turns = course.turns(places)
    n_steps = sum(-(-len(turn) // _ROWS_AT_ONCE) for turn in turns)
    done = int(state.turn)
    with progress_bar(
        total=sum(len(turn) for turn in turns),
        initial=sum(len(turn) for turn in turns[:done]),
        desc="descend",
        unit="position",
    ) as bar:
        for number in range(done, len(turns)):
            rows = rows_at(model, turns[number], maps.layers, spade)
            draws = torch.Generator().manual_seed(course.seed + 1 + number)
            order = torch.randperm(len(rows.model), generator=draws).to(model.device)
            losses = []
            for some in order.split(_ROWS_AT_ONCE):
                at = int(state.step)
                slope = min(1.0, (at + 1) / _WARM_UP) * (1 - at / n_steps)
                losses.append(_step(model, maps, mean, whiten, rows, some, state, course, slope))
                state.step.add_(1)
                bar.update(len(some))
            state.turn.add_(1)
            if not all(torch.isfinite(t).all() for t in (state.weight, state.bias)):
                raise FloatingPointError(
                    f"The maps became NaN or infinite after {int(state.step)} steps. Try a rate "
                    f"smaller than {course.rate}."
                )
            bar.set_postfix(kl=f"{sum(losses) / len(losses):.3f}")
            checkpoint.save("descent", vars(state))
    return _arrived(maps, state, mean, whiten)


def _step(
    model: Model,
    maps: AffineMaps,
    mean: Float[Tensor, "layer d_model"],
    whiten: Float[Tensor, "layer d_model d_model"],
    rows: Rows,
    some: Tensor,
    state: _State,
    course: Course,
    slope: float,
) -> float:
    """One step of every layer; returns the mean divergence before it."""
    total = 0.0
    with torch.no_grad():
        own = log_probs(model, rows.model[some])
        size = float(rows.model[some].float().square().mean(dim=-1).sqrt().median())
    for i, layer in enumerate(maps.layers):
        start = rows.start[i, some].float()
        with torch.no_grad():
            target = own if rows.spade is None else log_probs(model, rows.spade[i, some])
            white = (start - mean[i]) @ whiten[i]
            here = maps(start, layer)
        weight = state.weight[i].detach().requires_grad_()
        bias = state.bias[i].detach().requires_grad_()
        inner = white @ weight.T
        added = inner if maps.down is None else inner @ maps.up[i].T
        moved = (here + added + bias).to(model.dtype)
        logits = model.logits(moved)
        with torch.no_grad():
            # The gradient is known, and a graph of all that is [row d_vocab] is not needed.
            read = logits.log_softmax(dim=-1)
            total += float(torch.linalg.vecdot(target.exp(), target - read).mean())
            slopes = (read.exp_() - target.exp()) / len(some)
        # For these two only: the model's parameters have gradients of their own to offer.
        by_weight, by_bias = torch.autograd.grad(logits, [weight, bias], slopes)
        rate = course.rate * slope * size / model.d_model**0.5
        step = int(state.step) + 1
        # A coordinate of what is added is moved by d_model weights at once, but by one bias.
        few = model.d_model**0.5
        _adam(state.weight[i], by_weight, state.weight_m[i], state.weight_v[i], step, rate / few)
        _adam(state.bias[i], by_bias, state.bias_m[i], state.bias_v[i], step, rate)
    return total / len(maps.layers)


@torch.no_grad()
def _adam(value: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, rate: float) -> None:
    """Adam (Kingma and Ba 2015), in place."""
    m.lerp_(gradient, 1 - _BETAS[0])
    v.lerp_(gradient.square(), 1 - _BETAS[1])
    size = (v / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-12)
    value.addcdiv_(m, size, value=-rate / (1 - _BETAS[0] ** step))


def _arrived(
    maps: AffineMaps,
    state: _State,
    mean: Float[Tensor, "layer d_model"],
    whiten: Float[Tensor, "layer d_model d_model"],
) -> AffineMaps:
    """The maps in the residual stream's own coordinates."""
    weight = state.weight @ whiten.mT
    shift = (weight @ mean[..., None])[..., 0]
    if maps.down is None:
        return replace(maps, up=maps.up + weight, bias=maps.bias + state.bias - shift)
    shift = (maps.up @ shift[..., None])[..., 0]
    return replace(maps, down=maps.down + weight, bias=maps.bias + state.bias - shift)


@torch.no_grad()
def better_of(
    model: Model, before: AffineMaps, after: AffineMaps, rows: Rows
) -> tuple[AffineMaps, list[int]]:
    """At every layer the maps that diverge less on rows that neither was fitted to.

    Returns:
        The maps, and the layers that were better off before.
    """
    kl = torch.zeros(2, len(after.layers))
    for part in torch.arange(len(rows.model)).split(2 * _ROWS_AT_ONCE):
        own = log_probs(model, rows.model[part])
        for i, layer in enumerate(after.layers):
            target = own if rows.spade is None else log_probs(model, rows.spade[i, part])
            for n, maps in enumerate((before, after)):
                read = log_probs(model, maps(rows.start[i, part], layer))
                kl[n, i] += torch.linalg.vecdot(target.exp(), target - read).sum().cpu()
    worse = (kl[0] < kl[1]).nonzero().flatten().tolist()
    tensors = {name: tensor.clone() for name, tensor in after.tensors.items()}
    for name, tensor in before.tensors.items():
        tensors[name][worse] = tensor[worse]
    return after.having(tensors), [after.layers[i] for i in worse]
