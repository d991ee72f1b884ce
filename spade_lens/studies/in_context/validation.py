"""Our methods held against what is known exactly: what each should find in a trained network.

The network should do ridge regression on Phi. So what leaving an example out changes, what an
example contributes and where w is are known in closed form. Every row says how well a method finds
it: a correlation by prompt, or a slope (1 if the network changes as ridge regression does, 0 if it
does not change). Ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from spade_lens.icl.patching.shapley import all_coalitions, shapley_exact
from spade_lens.stats.intervals import mean_interval, ratio_interval
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import Drawn, InContextTask

ORDER = ["method", "truth", "layer", "measure", "score", "score_low", "score_high", "n"]
PLAYERS = 6
"""Examples of which Shapley values are exact: two to the power of this many runs of a prompt."""


class Validation:
    """A network, prompts, and what is known of the prediction at the last input.

    Args:
        network: The network; of a supervised task with one representation.
        drawn: Prompts.

    Raises:
        ValueError: If the task is of another form, has several representations, or fewer than
            three examples.
    """

    def __init__(self, network: InContextNetwork, drawn: Drawn) -> None:
        task = network.task
        if task.form != "supervised" or task.representations > 1 or task.examples < 3:
            raise ValueError(
                f"A {task.form} task of {task.representations} representations and "
                f"{task.examples} examples was given; expected a supervised one of one "
                "representation and at least 3 examples, whose ridge regression is the truth."
            )
        self.network, self.task, self.drawn = network, task, drawn
        self.stream = network.residuals(drawn)
        self.query = drawn.inputs.shape[1] - 1
        self.x, self.y = task.features(drawn).double(), drawn.targets[..., 0].double()

    # -- what is true

    def exact(self, kept: Bool[Tensor, " before"]) -> Float[Tensor, " prompt"]:
        """Return the Bayes prediction at the last input from some of the examples before it."""
        return exact_prediction(self.task, self.x, self.y, kept)

    def leverages(self) -> Float[Tensor, "prompt before"]:
        """Return the leverage of every example in the ridge regression on all of them."""
        x = self.x[:, : self.query]
        gram = x.mT @ x + self.task.penalty * torch.eye(x.shape[-1], dtype=torch.float64)
        return torch.einsum("bnf,bnf->bn", x @ torch.linalg.inv(gram), x)

    # -- what the network does

    @torch.no_grad()
    def without(self, kept: Bool[Tensor, " before"], layer: int = 0) -> Float[Tensor, " prompt"]:
        """Return the prediction if only some examples' tokens run on from a layer."""
        at = [p for i in range(self.query) if kept[i] for p in (2 * i, 2 * i + 1)]
        return self.stopped([*at, 2 * self.query], layer)

    @torch.no_grad()
    def stopped(self, positions: Sequence[int], layer: int) -> Float[Tensor, " prompt"]:
        """Return what SPADE reads: some tokens run on alone from a layer to the last.

        It is ``model.run_blocks`` of :class:`spade_lens.Model` at these positions: the learned
        positions are in the residuals already.
        """
        resid = self.stream[layer][:, list(positions)]
        resid = self.network.run_blocks(resid, layer, self.network.size.n_layers)
        return self.network.predict(resid[:, -1])[:, 0].double()

    @torch.no_grad()
    def knocked_out(self, example: int, *, query_only: bool) -> Float[Tensor, " prompt"]:
        """Return the prediction if nothing, or not the query alone, attends to an example.

        Attention to its two tokens is 0 in all blocks, and the rest is scaled to the sum of 1.
        """
        last, at = 2 * self.query, [2 * example, 2 * example + 1]
        rows = slice(last, last + 1) if query_only else slice(2 * example + 2, None)

        def cut(pattern: Tensor, hook: Any) -> Tensor:
            pattern = pattern.clone()
            pattern[:, :, rows, at] = 0.0
            return pattern / pattern.sum(dim=-1, keepdim=True)

        bridge = self.network.bridge()
        hooks = [(f"blocks.{b}.attn.hook_pattern", cut) for b in range(self.network.size.n_layers)]
        tokens = self.network.read_in(self.task.tokens(self.drawn))
        return bridge.run_with_hooks(tokens, fwd_hooks=hooks)[:, last, 0].double()

    # -- how well the second is the first

    def contributions(self) -> list[dict[str, Any]]:
        """Return rows on leaving examples out, cutting attention to them, and leverage."""
        everyone = torch.ones(self.query, dtype=torch.bool)
        full, known = self.without(everyone), self.exact(everyone)
        ours: dict[str, list[Tensor]] = {"left out": [], "query": [], "all": []}
        truth = []
        for j in range(self.query):
            others = everyone.clone()
            others[j] = False
            truth.append(known - self.exact(others))
            ours["left out"].append(full - self.without(others))
            ours["query"].append(full - self.knocked_out(j, query_only=True))
            ours["all"].append(full - self.knocked_out(j, query_only=False))
        exact, left_out = torch.stack(truth, dim=1), torch.stack(ours["left out"], dim=1)
        rows = [_correlation("leave one out", "exact leave one out", left_out, exact)]
        for of, name in (
            ("query", "the query to one example"),
            ("all", "all tokens to one example"),
        ):
            cut = torch.stack(ours[of], dim=1)
            rows.append(_correlation("knockout", f"{name}: exact leave one out", cut, exact))
        rows += [_size("exact leave one out", exact.flatten())]
        rows += [_size("the network minus Bayes", full - known)]
        leverage = self.leverages()
        rows.append(
            _correlation("leave one out", "size against leverage", left_out.abs(), leverage)
        )
        rows.append(
            _correlation("exact leave one out", "size against leverage", exact.abs(), leverage)
        )
        return rows

    def shapley(self) -> list[dict[str, Any]]:
        """Return a row on Shapley values of the first examples, the last input being the query."""
        n = min(PLAYERS, self.query)
        members = all_coalitions(n)
        kept = torch.zeros(len(members), self.query, dtype=torch.bool)
        kept[:, :n] = members
        ours = torch.stack([self.without(row) for row in kept], dim=1)  # [prompt coalition]
        exact = torch.stack([self.exact(row) for row in kept], dim=1)
        values = [torch.stack([shapley_exact(w) for w in worth]) for worth in (ours, exact)]
        return [_correlation("Shapley", f"exact, of {n} examples", values[0], values[1])]

    def sufficiency(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows on dropping every other example from a layer on, and on what suffices."""
        everyone = torch.ones(self.query, dtype=torch.bool)
        half = torch.arange(self.query) % 2 == 0
        full, known = self.without(everyone), self.exact(half) - self.exact(everyone)
        x_tokens, y_tokens = range(0, 2 * self.query, 2), range(1, 2 * self.query, 2)
        last = 2 * self.query
        sets = {
            "the query alone": [last],
            "start + query (SPADE)": [0, last],
            "x-tokens + query": [*x_tokens, last],
            "y-tokens + query": [*y_tokens, last],
        }
        rows = []
        for layer in layers:
            change = self.without(half, layer) - full
            rows.append(
                _slope("drop half of the examples", "ridge on the rest", change, known, layer)
            )
            for name, positions in sets.items():
                read = self.stopped(positions, layer)
                own = distance_row("to the network", read, full, layer)
                bayes = distance_row("to Bayes", read, self.exact(everyone), layer)
                rows += [{"method": name} | own, {"method": name} | bayes]
        return rows

    @torch.no_grad()
    def rule_patching(self, layers: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
        """Return rows on residuals of another prompt: same inputs, another w.

        Residuals at y-tokens, or at the query, are replaced at one layer. The slope says how far
        the prediction moves from the ridge regression of this prompt to that of the other.
        """
        drawn, generator = self.drawn, torch.Generator().manual_seed(seed)
        other = drawn.weights[torch.randperm(len(drawn), generator=generator)]
        relabelled = with_labels(self.task, drawn, other, drawn.which, generator)
        source = Validation(self.network, relabelled)
        everyone = torch.ones(self.query, dtype=torch.bool)
        full, known = self.without(everyone), source.exact(everyone) - self.exact(everyone)
        last = 2 * self.query
        places = {"y-tokens": list(range(1, last, 2)), "the query": [last]}
        rows = []
        for layer in layers:
            for name, positions in places.items():
                patched = (self.stream[layer], source.stream[layer], positions)
                moved = patched_prediction(self.network, layer, *patched, last) - full
                rows.append(
                    _slope(f"patch {name}", "ridge of the other prompt", moved, known, layer)
                )
        return rows

    def table(self, layers: Sequence[int] | None = None) -> pd.DataFrame:
        """Return all rows.

        Args:
            layers: Layers to read at; by default all.

        Returns:
            The columns ``method``, ``truth`` (what it is held against), ``layer`` (missing where
            the whole network runs), ``measure``, ``score`` with the ends of its interval over
            prompts, and ``n``.
        """
        several = range(self.network.size.n_layers + 1) if layers is None else layers
        rows = self.contributions() + self.shapley()
        rows += self.sufficiency(several) + self.rule_patching(several)
        frame = pd.DataFrame(rows)
        frame["layer"] = frame["layer"].astype("Int64")
        return frame[ORDER]


def exact_prediction(
    task: InContextTask,
    features: Float[Tensor, "prompt example d_phi"],
    targets: Float[Tensor, "prompt example"],
    kept: Bool[Tensor, " before"],
) -> Float[Tensor, " prompt"]:
    """Return the Bayes prediction at the last input from some of the examples before it.

    Args:
        task: The task, for the penalty.
        features: Phi of every input, the last one the query.
        targets: Their targets.
        kept: Which of the examples before the last are used.
    """
    x = features[:, : len(kept)][:, kept].double()
    gram = x.mT @ x + task.penalty * torch.eye(features.shape[-1], dtype=torch.float64)
    moment = x.mT @ targets[:, : len(kept)][:, kept].double()[..., None]
    weights = torch.linalg.solve(gram, moment)[..., 0]
    return (weights * features[:, len(kept)].double()).sum(dim=-1)


def with_labels(
    task: InContextTask,
    drawn: Drawn,
    weights: Float[Tensor, "prompt d_y d_phi"],
    which: Int[Tensor, " prompt"],
    generator: torch.Generator,
) -> Drawn:
    """Return prompts of the same inputs, with the labels of other weights and representations."""
    features = task.features(Drawn(drawn.inputs, drawn.targets, weights, which))
    clean = torch.einsum("bnf,byf->bny", features, weights)
    noise = task.noise * torch.randn(clean.shape, generator=generator)
    return Drawn(drawn.inputs, clean + noise, weights, which)


def patched_prediction(
    network: InContextNetwork,
    layer: int,
    resid: Float[Tensor, "prompt pos d_model"],
    source: Float[Tensor, "prompt pos d_model"],
    positions: Sequence[int],
    last: int,
) -> Float[Tensor, " prompt"]:
    """Return the prediction at a position if some residuals of a layer are those of a source."""
    patched = resid.clone()
    patched[:, positions] = source[:, positions]
    out = network.run_blocks(patched, layer, network.size.n_layers)
    return network.predict(out[:, last])[:, 0].double()


def _correlation(method: str, truth: str, ours: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return the mean over prompts of the correlation over a prompt's examples."""
    a, b = (t.double() - t.double().mean(dim=1, keepdim=True) for t in (ours, exact))
    each = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
    low, high = mean_interval(each.numpy())
    row = {"method": method, "truth": truth, "layer": None, "measure": "correlation"}
    return row | score_row(float(each.mean()), (low, high), len(each))


def _size(method: str, values: Tensor) -> dict[str, Any]:
    """Return the median size of an effect or an error, to be compared with another's."""
    row = {"method": method, "truth": "0", "layer": None, "measure": "median size"}
    return row | score_row(float(values.abs().median()), (float("nan"), float("nan")), len(values))


def _slope(method: str, truth: str, ours: Tensor, exact: Tensor, layer: int) -> dict[str, Any]:
    above, below = (ours * exact).numpy(), exact.square().numpy()
    row = {"method": method, "truth": truth, "layer": layer, "measure": "slope"}
    return row | _of_sums(above, below)


def distance_row(truth: str, ours: Tensor, exact: Tensor, layer: int) -> dict[str, Any]:
    """Return the mean squared distance over the variance of what is held against."""
    above, below = (ours - exact).square().numpy(), (exact - exact.mean()).square().numpy()
    return {"truth": truth, "layer": layer, "measure": "normalised error"} | _of_sums(above, below)


def _of_sums(above: NDArray[np.float64], below: NDArray[np.float64]) -> dict[str, Any]:
    return score_row(float(above.sum() / below.sum()), ratio_interval(above, below), len(above))


def score_row(score: float, ends: tuple[float, float], n: int) -> dict[str, Any]:
    """Return the columns of a score, the ends of its interval, and how many prompts it is of."""
    return {"score": score, "score_low": ends[0], "score_high": ends[1], "n": n}
