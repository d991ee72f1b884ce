"""The study: choose on calibration prompts, measure on others, race against the plain model."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spade_lens import storage
from spade_lens.exits.calibrate import Calibration, ExitRule, Ways
from spade_lens.exits.candidates import ExitWarning
from spade_lens.exits.choose import certify, families, global_thresholds
from spade_lens.exits.compare import iso_compute
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.keep_search import attention_keep, greedy_keep, keep_family
from spade_lens.exits.policies import FixedLayer, Oracle
from spade_lens.exits.simulate import simulate, sweep
from spade_lens.exits.table import ExitTable, load_table
from spade_lens.exits.table_notes import identity
from spade_lens.exits.wallclock import race
from spade_lens.lenses.keep import KeepRule
from spade_lens.lenses.lens import Lens
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.studies.exits.plan import LEARNED, ExitPlan

PAIR = "start+answer"
"""The name of the paper's keep set."""

_LEARN_FROM = 16
"""Keep sets that are learned are learned from so many calibration prompts."""

Rules = dict[tuple[str, float | None], ExitRule]
"""Ways to exit, by who made them and the loss of accuracy wanted."""


class Study:
    """One task under way; every method is one step, and what takes long is kept on disk.

    Args:
        model: The model.
        plan: What to do.
        checks: What is checked; the first stands for the paper's.
    """

    def __init__(self, model: Model, plan: ExitPlan, checks: Sequence[Confidence | Lens]) -> None:
        self.model, self.plan = model, plan
        self.checks = [c if isinstance(c, Confidence) else Confidence(c) for c in checks]
        if not self.checks:
            raise ValueError("checks=[] was given; expected at least one lens to check.")
        self.layers = plan.candidate_layers(model.n_layers)
        self.calibration_prompts = self._prompts("calibration", plan.calibration)
        self.test_prompts = self._prompts("test", plan.samples)
        model.check_prompts([*self.calibration_prompts, *self.test_prompts])
        plan.check_guarantee(len(self.calibration_prompts))
        self.keeps = self._keep_sets()
        ways = Ways.of(model, self.calibration_prompts, keep=self.keeps, checks=self.checks)
        tables = self._kept("calibration", self.calibration_prompts, ways, self.layers)
        self.found = Calibration(tables, ways)

    def rules(self) -> Rules:
        """The ways to exit that are measured, by who made them and the loss wanted."""
        chosen: Rules = {}
        for loss in self.plan.losses:
            chosen["ours", loss] = self.found.best(loss)
            if PAIR in self.keeps:
                chosen["the paper's", loss] = self.found.best(
                    loss, keep=PAIR, check=self.checks[0].name, family="threshold"
                )
        return chosen

    def certified(self) -> ExitRule | None:
        """The rule with a guarantee: chosen on one half, certified on the other."""
        plan = self.plan
        if plan.guarantee is None:
            return None
        half = len(self.found) // 2
        first, second = range(half), range(half, len(self.found))
        part = Calibration([t.of(first) for t in self.found.tables], self.found.ways)
        rule = part.best(plan.guarantee, family="threshold")
        table = self.found.table(rule).of(second)
        choice = certify(global_thresholds(), table, loss=plan.guarantee, risk=plan.risk)
        return ExitRule(rule.spade, rule.confidence, "threshold, certified", choice, rule.layers)

    def test_tables(self, rules: Sequence[ExitRule]) -> list[ExitTable]:
        """What the test prompts say of the keep sets chosen, and of the paper's."""
        names = {PAIR, *(rule.spade.name for rule in rules)}
        keeps = {name: rule for name, rule in self.keeps.items() if name in names}
        # The top-1 probability alone claims to be a chance, which reliability is about.
        sure = replace(self.checks[0], measure="top-1")
        more = [] if sure.name in [c.name for c in self.checks] else [sure]
        checks = [*self.checks, *more]
        ways = Ways.of(self.model, self.test_prompts, keep=keeps, checks=checks)
        return self._kept("test", self.test_prompts, ways, self.layers)

    def shorter_prompts(self, rules: Sequence[ExitRule]) -> list[ExitTable]:
        """The control: the tokens kept, and no others, from the embedding on."""
        keeps = {rule.spade.name: self.keeps[rule.spade.name] for rule in rules}
        first = self.checks[:1]
        ways = Ways.of(self.model, self.test_prompts, keep=keeps, checks=first, own_check=False)
        return self._kept("shorter-prompts", self.test_prompts, ways, [0])

    def points(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Every rule on the test prompts, with the controls and the bound."""
        rows: list[dict[Any, Any]] = []
        for (who, loss), rule in rules.items():
            table = _of(tables, rule)
            row = sweep(table, [rule.policy], seed=self.plan.seed).iloc[0].to_dict()
            choice = rule.choice
            rows.append(
                {
                    "rule": who,
                    "wanted": torch.nan if loss is None else loss,
                    "keep": rule.spade.name,
                    "kept": float(table.kept.double().mean()),
                    "check": rule.check,
                    "family": rule.family,
                    **{k: v for k, v in row.items() if k not in ("model", "check", "keep")},
                    "full_accuracy": table.accuracy,
                    "calibration_loss": choice.loss,
                    "calibration_speedup": choice.speedup,
                    "calibration_n": choice.n,
                    "p_value": choice.p_value,
                }
            )
        ours = [rule for (who, _), rule in rules.items() if who == "ours"]
        for table in self.shorter_prompts(ours):
            rows.append(self._control("shorter prompt", table, FixedLayer(0)))
        for name in dict.fromkeys(rule.spade.name for rule in ours):
            table = next(t for t in tables if t.keep == name)
            rows.append(self._control("oracle", table, Oracle()))
        frame = pd.DataFrame(rows)
        frame.insert(0, "model", self.model.name)
        frame.insert(1, "task", self.plan.task.name)
        return frame

    def sweeps(self, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Every policy on the test prompts: accuracy against compute.

        Thresholds by layer are those that the calibration prompts gave.
        """
        frames = []
        for before, table in self._pairs(tables):
            for family, policies in families(before).items():
                if policies and (policies[0].reads or table.check == self.checks[0].name):
                    found = sweep(table, policies, resamples=200, seed=self.plan.seed)
                    found.insert(0, "family", family)
                    frames.append(found)
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def exits(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Where every test prompt leaves, what it answers and what it costs, by rule."""
        frames = []
        for (who, loss), rule in rules.items():
            frame = simulate(_of(tables, rule), rule.policy).to_frame()
            wanted = "best accuracy" if loss is None else f"loss at most {loss:g}"
            frame["policy"] = f"{who}, {wanted}"
            frames.append(frame.drop(columns="seconds"))
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def iso_compute(self, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Accuracy at equal compute, by check and keep set; see :func:`exits.iso_compute`."""
        frames = []
        for before, table in self._pairs(tables):
            several = {k: v for k, v in families(before).items() if v}
            frames.append(iso_compute(before, table, several, seed=self.plan.seed))
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def race(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Seconds beside the plain model's, on some of the test prompts.

        Ours are run, and the paper's at the last of the losses wanted; ways that come to the same
        once. The engine's exits are compared with what was
        simulated on the way; rounding may part them where a confidence lies on its threshold.

        Returns:
            A row for every rule: ``task, rule, wanted``; ``simulated_speedup`` of these very
            prompts; ``wall_same``, the share of them with the simulation's exit and answer; and
            :class:`~spade_lens.exits.WallClock` with ``wall_`` before each name.
        """
        prompts = self.test_prompts[: self.plan.race]
        last = "the paper's", self.plan.losses[-1]
        rules = {key: rule for key, rule in rules.items() if key[0] == "ours" or key == last}
        distinct: dict[tuple[str, str, str], ExitRule] = {}
        for rule in rules.values():
            distinct.setdefault(_way(rule), rule)
        clock = [self.plan.rounds, self.model.device.type, torch.get_num_threads()]
        ways = [list(way) for way in distinct]
        place = self._part("race", prompts, self.found.ways, self.layers, ways, clock)
        done = place.with_suffix(".csv")
        if not done.exists():
            place.parent.mkdir(exist_ok=True)
            storage.write_csv(done, self._race(list(distinct.values()), tables, prompts))
        measured = dict(zip(distinct, pd.read_csv(done).to_dict("records"), strict=True))
        rows = [
            {"task": self.plan.task.name, "rule": who, "wanted": torch.nan if w is None else w}
            | measured[_way(rule)]
            for (who, w), rule in rules.items()
        ]
        return pd.DataFrame(rows)

    def _race(
        self, rules: Sequence[ExitRule], tables: Sequence[ExitTable], prompts: Sequence[Prompt]
    ) -> pd.DataFrame:
        # A policy that never exits is a warning when it is chosen; once is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExitWarning)
            engines = [rule.engine() for rule in rules]
        rows = []
        for rule, engine in zip(rules, engines, strict=True):
            trace = engine.run(prompts)
            expected = simulate(_of(tables, rule).of(range(len(prompts))), rule.policy)
            same = (trace.exit_layer == expected.exit_layer) & (trace.answer == expected.answer)
            if not same.all():
                warnings.warn(
                    f"With the policy {rule.policy.name!r} the engine parts from the simulation "
                    f"on {int((~same).sum())} of {len(prompts)} prompts.",
                    ExitWarning,
                    stacklevel=2,
                )
            rows.append(
                {
                    "simulated_speedup": expected.speedup,
                    "wall_prompts": len(prompts),
                    "wall_same": float(same.double().mean()),
                }
            )
        timed = race(engines, prompts, rounds=self.plan.rounds)
        measured = pd.DataFrame([t.to_dict() for t in timed])
        return pd.concat([pd.DataFrame(rows), measured.add_prefix("wall_")], axis=1)

    def _control(self, rule: str, table: ExitTable, policy: FixedLayer | Oracle) -> dict[Any, Any]:
        row = sweep(table, [policy], seed=self.plan.seed).iloc[0].to_dict()
        return {
            "rule": rule,
            "wanted": torch.nan,
            "keep": table.keep,
            "kept": float(table.kept.double().mean()),
            "check": "",
            "family": "",
            **{k: v for k, v in row.items() if k not in ("model", "check", "keep")},
            "full_accuracy": table.accuracy,
        }

    def _prompts(self, split: str, n: int) -> list[Prompt]:
        plan = self.plan
        return plan.task.prompts(
            self.model.tokenizer,
            n,
            shots=plan.shots,
            seed=plan.seed,
            split=split,
            max_tokens=plan.max_tokens,
            fewer=True,
        )

    def _keep_sets(self) -> dict[str, KeepRule]:
        """The keep sets to choose from; those that are learned are learned here.

        Raises:
            ValueError: If there is no keep set of a name.
        """
        known, wanted = keep_family(self.calibration_prompts), self.plan.keep
        if wanted is None:
            return known
        if isinstance(wanted, Mapping):
            return dict(wanted)
        return {name: known.get(name) or self._learned(name) for name in wanted}

    def _learned(self, name: str) -> KeepRule:
        match = LEARNED.fullmatch(name)
        if match is None:  # the plan knows what prompts with demonstrations have
            raise ValueError(f"These prompts have no keep set {name!r}; give some demonstrations.")
        # Never from those that certify.
        most = len(self.calibration_prompts) // (1 if self.plan.guarantee is None else 2)
        some = self.calibration_prompts[: min(_LEARN_FROM, most)]
        middle, size = self.layers[len(self.layers) // 2], int(match[2])
        if match[1] == "attention":
            found = attention_keep(self.model, some, size=size, layer=middle)
        else:
            found = greedy_keep(self.model, some, size=size, layers=[middle])[-1]
        return replace(found, name=name)

    def _pairs(self, tables: Sequence[ExitTable]) -> Iterator[tuple[ExitTable, ExitTable]]:
        """The calibration and the test table of every keep set and check that have both."""
        before = {(t.keep, t.check): t for t in self.found.tables}
        for table in tables:
            if (table.keep, table.check) in before:
                yield before[table.keep, table.check], table

    def _kept(
        self, name: str, prompts: Sequence[Prompt], ways: Ways, layers: Sequence[int]
    ) -> list[ExitTable]:
        """Tables from disk, where this very step is done already; else made and kept there."""
        place = self._part(name, prompts, ways, layers)
        done = place / "done.json"
        if not done.exists():
            tables = ways.tables(prompts, layers=layers, checkpoint=place)
            for i, table in enumerate(tables):
                table.save(place / str(i))
            storage.write_json(done, {"tables": len(tables)})
        n = json.loads(done.read_text())["tables"]
        return [load_table(place / str(i)) for i in range(n)]

    def _part(
        self, name: str, prompts: Sequence[Prompt], ways: Ways, layers: Sequence[int], *more: Any
    ) -> Path:
        """A place on disk, named by everything that decides what will be there."""
        confidences, spades = list(ways.confidences.values()), list(ways.spades.values())
        deciding = {
            "versions": storage.versions(),
            "run": identity(self.model, prompts, confidences, spades, layers),
            "targets": [p.target for p in prompts],
            "more": more,
        }
        key = hashlib.sha256(json.dumps(deciding, default=str).encode()).hexdigest()[:16]
        return self.plan.out / "parts" / f"{name}-{key}"


def _of(tables: Sequence[ExitTable], rule: ExitRule) -> ExitTable:
    """The table of a rule's keep set and check."""
    names = rule.spade.name, rule.confidence.name
    return next(t for t in tables if (t.keep, t.check) == names)


def _way(rule: ExitRule) -> tuple[str, str, str]:
    """What tells ways apart; a policy's name may leave its thresholds out."""
    return rule.spade.name, rule.check, repr(rule.policy)
