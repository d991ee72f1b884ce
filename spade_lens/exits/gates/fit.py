"""Fit gates on exit tables, keep what was fitted, and give it to a calibration.

No model runs here: confidences, features, answers, probabilities and prices are in the tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.checks import as_several, check_number, checked
from spade_lens.exits.gates.gate import Gate
from spade_lens.exits.gates.jei import cross_fitted, published
from spade_lens.exits.gates.rows import GateRows, Loss, gate_rows
from spade_lens.exits.gates.stopping import stopping_rules
from spade_lens.exits.table import ExitTable
from spade_lens.exits.uncertainty import check_disjoint
from spade_lens.models.identity import identity_of, read_made_with, refuse_unnamed
from spade_lens.models.model import Model
from spade_lens.settings import progress_bar
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import write_pair

GateKind: TypeAlias = Literal["stopping", "jei", "jei, cross-fitted"]

COSTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Cost weights by default: the loss that the full model's FLOPs are worth."""

_KIND = "gates"


@dataclass(frozen=True, eq=False, repr=False)
class Gates:
    """Gates that were fitted on exit tables, a policy for every cost weight, most careful first.

    Made by :func:`fit_gates`, or loaded by :func:`load_gates`. As a family of policies they go
    into ``calibrate(families={"stopping": gates})``: called with a calibration table, they give the
    policies of its check and keep set.

    Args:
        policies: The policies of all tables that they were fitted on.
        identity: The numbers of the prompts that they were fitted on.
        about: How they were fitted, ready for JSON.
    """

    policies: tuple[Gate, ...]
    identity: Int[Tensor, " prompt"]
    about: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Gates({self.about.get('kind')!r}, {len(self.policies)} policies, fitted on "
            f"{len(self.identity)} prompts)"
        )

    @checked
    def __call__(self, table: ExitTable) -> tuple[Gate, ...]:
        """Return the policies for a calibration table; none if its check or keep set has none.

        Raises:
            ValueError: If it holds a prompt that the gates were fitted on, or is another model's.
        """
        check_disjoint({"the prompts that the gates were fitted on": self, "the table": table})
        models = {gate.made_for["model"] for gate in self.policies}
        if models != {table.model}:
            raise ValueError(
                f"The gates were fitted on tables of {', '.join(sorted(models))}; this table is of "
                f"{table.model}. Fit gates on this model's tables."
            )
        wanted = {"model": table.model, "check": table.check, "keep": table.keep}
        return tuple(gate for gate in self.policies if gate.made_for == wanted)

    @checked
    def save(self, folder: str | PathLike[str], model: Model) -> Path:
        """Write ``gates.safetensors`` and ``gates.json`` into a folder; return the folder.

        Args:
            folder: The folder, made if it does not exist.
            model: The model of the tables. They hold only its name, and files its weights' hash.

        Raises:
            ValueError: If the gates were fitted on tables of a model of another name, or the model
                has hooks without a name.
        """
        names = {gate.made_for["model"] for gate in self.policies}
        if names != {model.name}:
            raise ValueError(
                f"model={model.name!r} was given; expected {', '.join(sorted(names))}, on whose "
                "tables the gates were fitted."
            )
        identity = identity_of(model)
        refuse_unnamed(identity, "The gates")
        tensors: dict[str, Tensor] = {"identity": self.identity}
        described = []
        for i, gate in enumerate(self.policies):
            tensors |= {f"{i}.weights": gate.weights, f"{i}.bias": gate.bias}
            described.append(
                {
                    "name": gate.name,
                    "rule": gate.rule,
                    "layers": list(gate.layers),
                    "reads": gate.reads,
                    "made_for": dict(gate.made_for),
                }
            )
        content = {"model": identity, "gates": described, "about": self.about}
        return write_pair(as_path(folder) / f"{_KIND}.safetensors", _KIND, tensors, content).parent


@checked
def load_gates(folder: str | PathLike[str], model: Model) -> Gates:
    """Return what :meth:`Gates.save` wrote.

    Example:
        >>> load_gates("gates/sst2", model)  # doctest: +SKIP

    Args:
        folder: The folder.
        model: The model of the tables that they were fitted on.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If they belong to another model, or the files are damaged.
    """
    path, content, tensors = read_made_with(model, folder, _KIND)
    with naming_damage(path, again="fit and save the gates"):
        gates = tuple(
            Gate(
                name=one["name"],
                rule=one["rule"],
                layers=tuple(one["layers"]),
                weights=tensors[f"{i}.weights"],
                bias=tensors[f"{i}.bias"],
                made_for=one["made_for"] | {"model": model.name},
                reads=one["reads"],
            )
            for i, one in enumerate(content["gates"])
        )
        return Gates(gates, tensors["identity"], content["about"])


@checked
def fit_gates(
    tables: ExitTable | Sequence[ExitTable],
    kind: GateKind = "stopping",
    *,
    loss: Loss = "cross-entropy",
    costs: Sequence[float] = COSTS,
    folds: int = 5,
    seed: int = 0,
) -> Gates:
    """Fit gates that decide when a prompt leaves, one for every cost weight.

    The kinds are:

    - ``"stopping"``: optimal stopping by backward regression; see
      :mod:`spade_lens.exits.gates.stopping`. It also decides which layers are checked, and checks
      none where a fixed layer does as well.
    - ``"jei"``: JEI-DNN's gates as published, as far as readouts that are not trained allow; see
      :mod:`spade_lens.exits.gates.jei`. They need features.
    - ``"jei, cross-fitted"``: the same, stopped early and averaged over folds.

    Example:
        >>> from spade_lens.exits import Confidence, exit_tables, fit_gates, gate_features
        >>> check = Confidence(LogitLens(model), features=gate_features)
        >>> prompts = ["abcdefghijklmnopqrstuvwxyz"[i : i + 5] for i in range(22)]
        >>> tables = exit_tables(model, prompts, check, layers=[1, 2, 3])
        >>> gates = fit_gates(tables, loss="disagrees", costs=[0.1, 1.0])
        >>> [gate.name for gate in gates.policies]
        ['stopping 0.1', 'stopping 1']

    Args:
        tables: Tables of training prompts, one for each check and keep set that gates are for:
            of :func:`exit_tables`, or ``calibrate(...).tables``. Lenses that are checked or answer
            must not have been fitted on these prompts.
        kind: How gates are fitted.
        loss: ``"cross-entropy"`` of the right candidate where the prompt leaves; or 1 where the
            answer is ``"wrong"``, or ``"disagrees"`` with the full model's.
        costs: Cost weights: the loss that the full model's FLOPs are worth.
        folds: In how many parts prompts are divided for cross-fitting.
        seed: The seed of the folds, and of JEI-DNN's descent.

    Returns:
        The gates. Their cost weight has to be calibrated on other prompts, and
        ``calibrate(families={"gates": gates})`` refuses those that they were fitted on.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there are fewer than 20 prompts whose loss is known, two tables are of one
            check and keep set, tables are of several models, a number is not finite, or JEI-DNN's
            gates are given no features.
    """
    several = as_several(tables)
    given: list[Any] = [tables] if several is None else several
    weights = _checked_costs(costs)
    every = [gate_rows(table, loss) for table in _checked_tables(given)]
    check_number("folds", folds, least=2)
    for rows in every:
        if folds > len(rows):
            raise ValueError(f"folds={folds} was given; expected at most {len(rows)}, the prompts.")
        if kind != "stopping" and not rows.table.features.shape[-1]:
            raise ValueError(
                f"kind={kind!r} weighs features, and the table of check {rows.table.check!r} has "
                "none. Make it with Confidence(lens, features=gate_features)."
            )
    policies: list[Gate] = []
    for rows in progress_bar(every, desc="fit gates", unit="table"):
        policies += _fitted(rows, kind, weights, folds, seed)
    identity = torch.cat([rows.table.identity for rows in every]).unique()
    about = {
        "kind": kind,
        "loss": loss,
        "costs": weights,
        "folds": folds,
        "seed": seed,
        "prompts": len(identity),
    }
    return Gates(tuple(policies), identity, about)


def _fitted(
    rows: GateRows, kind: GateKind, costs: Sequence[float], folds: int, seed: int
) -> list[Gate]:
    table = rows.table
    made_for = {"model": table.model, "check": table.check, "keep": table.keep}
    names = [f"{kind} {cost:.4g}" for cost in costs]
    if kind == "stopping":
        fold = rows.folds(folds, torch.Generator().manual_seed(seed))
        gates = []
        for name, rule in zip(names, stopping_rules(rows, costs, fold), strict=True):
            layers = tuple(table.layers[i] for i in rule.checked)
            fitted = rule.weights, rule.bias, made_for, rule.reads
            gates.append(Gate(name, "stopping", layers, *fitted))
        return gates
    if kind == "jei":
        weights, bias = published(rows, costs, seed)
    else:
        weights, bias = cross_fitted(rows, costs, folds, seed)
    return [
        Gate(name, "hazard", table.layers, weights[i].contiguous(), bias[i].contiguous(), made_for)
        for i, name in enumerate(names)
    ]


def _checked_costs(costs: Sequence[float]) -> list[float]:
    expected = "cost weights above 0, each once, such as (0.1, 0.3, 1.0)"
    values = as_several(costs)
    numbers = [] if values is None else values
    for value in numbers:
        check_number("costs", value, whole=False)
    if not numbers or not all(0 < v and isfinite(v) for v in numbers):
        raise ValueError(f"costs={costs!r} was given; expected {expected}.")
    if len({f"{v:.4g}" for v in numbers}) < len(numbers):
        raise ValueError(f"costs={costs!r} names one weight twice; expected {expected}.")
    return sorted(float(v) for v in numbers)


def _checked_tables(tables: Sequence[Any]) -> list[ExitTable]:
    for table in tables:
        if not isinstance(table, ExitTable):
            raise TypeError(f"tables={tables!r:.80} was given; expected exit tables.")
    if not tables:
        raise ValueError("tables=[] was given; expected at least one exit table.")
    if len({table.model for table in tables}) > 1:
        raise ValueError(
            f"The tables are of the models {sorted({t.model for t in tables})}; expected one model."
        )
    pairs = [(table.check, table.keep) for table in tables]
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if twice:
        raise ValueError(
            f"Two tables are of check {twice[0][0]!r} and keep set {twice[0][1]!r}; expected one "
            "for each. Give all prompts to one exit_tables()."
        )
    return list(tables)
