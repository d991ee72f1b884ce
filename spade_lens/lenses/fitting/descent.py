"""Descent on the Kullback-Leibler divergence of what a linear lens reads from what it should.

Adam moves the maps in coordinates in which every layer's residuals have mean zero and next to no
correlations. In the residual stream's own coordinates a few directions are hundreds of times
larger than the others, and keep the step so small that the others hardly move.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.lenses.fitting.held_out import log_probs
from spade_lens.lenses.fitting.plan import FitPlan
from spade_lens.lenses.fitting.ridge import Spectrum
from spade_lens.lenses.fitting.rows import Places, Rows, rows_at
from spade_lens.lenses.fitting.run import FitRun
from spade_lens.lenses.linear import AffineMaps
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.settings import limits, progress_bar

_STEP_ROWS = 64
"""Rows of one step: more of them point better, fewer let it step more often."""

_WARM_UP = 10
"""Steps over which the rate rises: Adam's first steps have all the same size."""

_BETAS = (0.9, 0.98)

_FLOOR = 0.1
"""Correlations' eigenvalues (1 on average) below this are not scaled up to full size."""


@dataclass(frozen=True)
class _State:
    """What has been learned, and Adam's moments of it, all changed in place.

    ``weight`` is added to ``A`` (to ``down`` if there is one) in white coordinates.
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


@dataclass(frozen=True)
class _Descent:
    """The maps on their way, in white coordinates.

    Args:
        model: The model.
        maps: Where the maps began.
        rate: The size of a step, relative to a final residual.
        mean: The residuals' means.
        whiten: What makes residuals less their mean white.
        state: What has been learned.
    """

    model: Model
    maps: AffineMaps
    rate: float
    mean: Float[Tensor, "layer d_model"]
    whiten: Float[Tensor, "layer d_model d_model"]
    state: _State

    def step(self, rows: Rows, chosen: Int[Tensor, " step_row"], slope: float) -> float:
        """Move every layer's map once, and return the mean divergence before that."""
        total, final = 0.0, rows.model[chosen]  # [step_row d_model]
        with torch.no_grad():
            of_model = log_probs(self.model, final)
            size = float(final.float().square().mean(dim=-1).sqrt().median())
        for i in range(len(self.maps.layers)):
            with torch.no_grad():
                target = of_model
                if rows.spade is not None:
                    target = log_probs(self.model, rows.spade[i, chosen])
            total += self._layer(i, rows.start[i, chosen].float(), target, self.rate * slope * size)
        self.state.step.add_(1)
        return total / len(self.maps.layers)

    def _layer(
        self,
        i: int,
        start: Float[Tensor, "step_row d_model"],
        target: Float[Tensor, "step_row d_vocab"],
        rate: float,
    ) -> float:
        model, maps, state = self.model, self.maps, self.state
        with torch.no_grad():
            white = (start - self.mean[i]) @ self.whiten[i]
            unmoved = maps(start, maps.layers[i])
        weight = state.weight[i].detach().requires_grad_()
        bias = state.bias[i].detach().requires_grad_()
        inner = white @ weight.T  # [step_row inner]
        added = inner if maps.down is None else inner @ maps.up[i].T
        logits = model.logits((unmoved + added + bias).to(model.dtype))
        with torch.no_grad():
            # The gradient is known, and a graph of all that is [step_row d_vocab] is not needed.
            read = logits.log_softmax(dim=-1)
            divergence = float(torch.linalg.vecdot(target.exp(), target - read).mean())
            slopes = (read.exp_() - target.exp()) / len(start)
        # For these two only: the model's parameters have gradients of their own to offer.
        by_weight, by_bias = torch.autograd.grad(logits, [weight, bias], slopes)
        # A coordinate of what is added is moved by d_model weights at once, but by one bias.
        width = model.d_model**0.5
        step = int(state.step) + 1
        moments = (state.weight_m[i], state.weight_v[i])
        _adam(state.weight[i], by_weight, moments, step, rate / width / width)
        _adam(state.bias[i], by_bias, (state.bias_m[i], state.bias_v[i]), step, rate / width)
        return divergence

    def result(self) -> AffineMaps:
        """Return the maps in the residual stream's own coordinates."""
        maps, state = self.maps, self.state
        weight = state.weight @ self.whiten.mT  # [layer inner d_model]
        shift = (weight @ self.mean[..., None])[..., 0]  # [layer inner]
        if maps.down is None:
            return replace(maps, up=maps.up + weight, bias=maps.bias + state.bias - shift)
        shift = (maps.up @ shift[..., None])[..., 0]  # [layer d_model]
        return replace(maps, down=maps.down + weight, bias=maps.bias + state.bias - shift)


def descend(
    run: FitRun, maps: AffineMaps, problems: Sequence[Spectrum], spade: Spade | None
) -> AffineMaps:
    """Return maps that have gone downhill from the ones given, to SPADE's output or the model's.

    Residuals are computed again in every pass, not stored.
    """
    model, plan = run.model, run.plan
    state = _State.at(maps)
    saved = run.checkpoint.load("descent", model.device)
    if saved is not None:
        state = _State(**saved)
    mean = torch.stack([p.mean_x for p in problems]).float()
    whiten = torch.stack([p.whiten(_FLOOR) for p in problems]).float()
    descent = _Descent(model, maps, plan.rate, mean, whiten, state)
    turns = _turns(run.split.train, plan)
    n_steps = sum(-(-len(turn) // _STEP_ROWS) for turn in turns)
    done = int(state.turn)
    with progress_bar(
        total=sum(len(turn) for turn in turns),
        initial=sum(len(turn) for turn in turns[:done]),
        desc="descend",
        unit="position",
        model=model,
    ) as bar:
        for number in range(done, len(turns)):
            rows = rows_at(model, turns[number], maps.layers, spade)
            draws = torch.Generator().manual_seed(int(plan.seed) + 1 + number)
            order = torch.randperm(len(rows.model), generator=draws).to(model.device)
            divergences = []
            for chosen in order.split(_STEP_ROWS):
                at = int(state.step)
                slope = min(1.0, (at + 1) / _WARM_UP) * (1 - at / n_steps)
                divergences.append(descent.step(rows, chosen, slope))
                bar.update(len(chosen))
            state.turn.add_(1)
            if not all(torch.isfinite(t).all() for t in (state.weight, state.bias)):
                raise FloatingPointError(
                    f"The maps became NaN or infinite after {int(state.step)} steps. Try a rate "
                    f"smaller than {plan.rate}."
                )
            bar.set_postfix(kl=f"{sum(divergences) / len(divergences):.3f}")
            run.checkpoint.save("descent", vars(state))
    return descent.result()


def _turns(places: Places, plan: FitPlan) -> list[Places]:
    """Return every pass's batches, in the order in which they are taken."""
    draws = torch.Generator().manual_seed(int(plan.seed))
    turns: list[Places] = []
    for _ in range(plan.passes):
        order = torch.randperm(len(places.pieces), generator=draws).tolist()
        shuffled = Places(
            tuple(places.pieces[i] for i in order), tuple(places.positions[i] for i in order)
        )
        turns += shuffled.batches()
    return turns


@torch.no_grad()
def _adam(
    value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float
) -> None:
    """Take one step of Adam (Kingma and Ba 2015), in place."""
    first, second = moments
    first.lerp_(gradient, 1 - _BETAS[0])
    second.lerp_(gradient.square(), 1 - _BETAS[1])
    size = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-12)
    value.addcdiv_(first, size, value=-rate / (1 - _BETAS[0] ** step))


@torch.no_grad()
def better_of(
    model: Model, before: AffineMaps, after: AffineMaps, rows: Rows
) -> tuple[AffineMaps, list[int]]:
    """Return, at every layer, the maps that diverge less on rows that neither was fitted to.

    With them the layers that were better off before the descent.
    """
    kl = torch.zeros(2, len(after.layers))
    at_once = limits(model).rows(3 * 4 * model.d_vocab)
    for part in torch.arange(len(rows.model)).split(at_once):
        of_model = log_probs(model, rows.model[part])
        for i, layer in enumerate(after.layers):
            target = of_model if rows.spade is None else log_probs(model, rows.spade[i, part])
            for n, maps in enumerate((before, after)):
                read = log_probs(model, maps(rows.start[i, part], layer))
                kl[n, i] += torch.linalg.vecdot(target.exp(), target - read).sum().cpu()
    worse = (kl[0] < kl[1]).nonzero().flatten().tolist()
    tensors = {name: tensor.clone() for name, tensor in after.tensors.items()}
    for name, tensor in before.tensors.items():
        tensors[name][worse] = tensor[worse]
    return after.having(tensors), [after.layers[i] for i in worse]
