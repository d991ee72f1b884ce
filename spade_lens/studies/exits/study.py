"""The study of early exit: choose on calibration prompts, measure on others, time it.

Every method is one step. What takes long is kept on disk and is not done again.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spade_lens.checks import warn
from spade_lens.exits.calibration import Calibration, ExitRule
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.controls import (
    FixedMatch,
    beyond_fixed,
    match_fixed,
    outcomes,
    random_exits,
)
from spade_lens.exits.families import families
from spade_lens.exits.keep_search import keep_sets
from spade_lens.exits.policies import FixedLayer, Oracle
from spade_lens.exits.setup import OWN, ExitWarning, Setup
from spade_lens.exits.sweeps import OTHERS, iso_compute, sweep
from spade_lens.exits.table import ExitTable
from spade_lens.exits.table_pass import tables_of
from spade_lens.exits.wall_clock import compare_wall_clock
from spade_lens.lenses.keep import Keep, KeepRule
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.files import naming_damage, read_json, set_aside, write_json
from spade_lens.studies.base import Study, StudyResult, say, show_files
from spade_lens.studies.exits.demonstrations import fewer_demonstrations
from spade_lens.studies.exits.findings import PAPER_KEEP, exit_findings, point
from spade_lens.studies.exits.plan import ExitPlan
from spade_lens.studies.exits.probabilities import conformal_of, reliability_of
from spade_lens.studies.fit import named_lens

Rules = dict[tuple[str, float | None], ExitRule]
"""Rules for exiting, by who made them and the loss of accuracy wanted."""

COVERAGE = 0.9
"""How often conformal sets should hold the right candidate."""

FIXED = "fixed layer"
"""The control that checks nothing, chosen from the same keep sets on the same prompts."""


class ExitStudy(Study[ExitPlan], plan=ExitPlan):
    """Early exit on the task of a plan; see :class:`ExitPlan`."""

    def __init__(self, model: Model, plan: ExitPlan, *, fresh: bool = False) -> None:
        super().__init__(model, plan, fresh=fresh)
        checks = [named_lens(model, c) if isinstance(c, str) else c for c in plan.checks]
        self.checks = [c if isinstance(c, Confidence) else Confidence(c) for c in checks]
        self.layers = plan.candidate_layers(model.n_layers)
        self.calibration_prompts = self._prompts("calibration", plan.calibration)
        self.test_prompts = self._prompts("test", plan.samples)
        model.check_prompts([*self.calibration_prompts, *self.test_prompts])
        plan.check_guarantee(len(self.calibration_prompts))
        self.keeps = self._keep_sets()
        setup = self._setup(self.keeps, [*self.checks, OWN])
        tables = self._tables("calibration", self.calibration_prompts, setup)
        self.calibration = Calibration(tables, setup, families=plan.families)

    def run(self) -> StudyResult:
        """Choose, measure and time; print the table, and write everything."""
        plan = self.plan
        rules = self.rules()
        certified = self.certified()
        if certified is not None:
            rules["certified", plan.guarantee] = certified
        matches = self.matches(rules)
        keeps = {rule.spade.name for rule in rules.values()}
        keeps |= {keep for match in matches.values() for keep, _ in match.ways}
        tables = self.test_tables(keeps)
        points = self.points(rules, tables, matches)
        if plan.rounds:
            timed = self.wall_clock(rules, tables)
            points = points.merge(timed, on=["task", "rule", "wanted"], how="left")
        frames = {
            "points": points,
            "sweeps": self.sweeps(tables),
            "tried": self.calibration.tried(plan.losses[-1]),
            "exits": self.exits(rules, tables),
            "iso-compute": self.iso_compute(tables),
            "gated-reliability": self._of_task([reliability_of(rules, tables)]),
        }
        sets = conformal_of(rules, tables, chosen_on=self.calibration.tables, confidence=COVERAGE)
        if len(sets):
            frames["conformal"] = self._of_task([sets])
        findings = exit_findings(
            plan,
            self.model,
            frames=frames,
            tables=tables,
            checks=[c.name for c in self.checks],
            best=rules["ours", plan.losses[-1]],
        )
        result = self.write(
            findings,
            name="exit",
            candidate_layers=list(self.layers),
            calibration_prompts=len(self.calibration_prompts),
            test_prompts=len(self.test_prompts),
            checks=[{"name": c.name, "lens": getattr(c.lens, "about", {})} for c in self.checks],
        )
        say(f"\n{result.text}\n")
        show_files(result.files)
        return result

    def rules(self) -> Rules:
        """Choose the rules that are measured, by who made them and the loss wanted."""
        chosen: Rules = {}
        for loss in self.plan.losses:
            chosen["ours", loss] = self.calibration.best(loss)
            if PAPER_KEEP in self.keeps and "threshold" in self.calibration.families:
                chosen["the paper's", loss] = self.calibration.best(
                    loss, keep=PAPER_KEEP, check=self.checks[0].name, family="threshold"
                )
            chosen[FIXED, loss] = self.fixed.best(loss)
        return chosen

    @property
    def fixed(self) -> Calibration:
        """The calibration with fixed layers alone, whatever families were asked for."""
        return Calibration(self.calibration.tables, self.calibration.setup, families=FIXED)

    def matches(self, rules: Rules) -> dict[tuple[str, float | None], FixedMatch]:
        """Return the fixed layers that are as accurate as each rule on the calibration prompts."""
        tables = self.calibration.tables
        return {
            key: match_fixed(tables, outcomes(rule.table(tables), rule.policy).accuracy)
            for key, rule in rules.items()
            if key[0] != FIXED
        }

    def certified(self) -> ExitRule | None:
        """Choose the rule with a guarantee on one half of the prompts, certify it on the other."""
        plan = self.plan
        if plan.guarantee is None:
            return None
        return self.calibration.certified(plan.guarantee, risk=plan.risk)

    def test_tables(self, keeps: Collection[str]) -> list[ExitTable]:
        """Run the test prompts with keep sets of these names, and with the paper's."""
        keeps = {n: rule for n, rule in self.keeps.items() if n in keeps or n == PAPER_KEEP}
        # Reliability is about the top-1 probability, which alone claims to be a chance.
        top_1 = replace(self.checks[0], measure="top-1")
        more = [] if top_1.name in [c.name for c in self.checks] else [top_1]
        setup = self._setup(keeps, [*self.checks, *more, OWN])
        return self._tables("test", self.test_prompts, setup)

    def shorter_prompts(self, rules: Sequence[ExitRule]) -> list[ExitTable]:
        """Run the control: the kept tokens, and no others, from the embedding on."""
        keeps = {rule.spade.name: self.keeps[rule.spade.name] for rule in rules}
        setup = self._setup(keeps, self.checks[:1], [0])
        return self._tables("shorter-prompts", self.test_prompts, setup)

    def points(
        self,
        rules: Rules,
        tables: Sequence[ExitTable],
        matches: Mapping[tuple[str, float | None], FixedMatch],
    ) -> pd.DataFrame:
        """Measure every rule on the test prompts, with the controls and the bound."""
        rows: list[dict[str, Any]] = []
        for (who, loss), rule in rules.items():
            table = rule.table(tables)
            measured = outcomes(table, rule.policy)
            row = point(who, table, measured, rule.policy.name)
            wanted = {"wanted": torch.nan if loss is None else loss}
            row |= wanted | {"check": rule.check, "family": rule.family}
            choice = {n: getattr(rule.choice, n) for n in ("loss", "speedup", "n")}
            row |= {f"calibration_{name}": value for name, value in choice.items()}
            row |= {"p_value": rule.choice.p_value, "chosen_on": OTHERS}
            if (who, loss) in matches:
                match = matches[who, loss]
                row |= {"fixed": match.name}
                row |= beyond_fixed(measured, match.outcomes(tables), match)
            rows.append(row)
            if who == "ours":
                by_chance = random_exits(table, rule.policy)
                name = f"at random, as {rule.policy.name}"
                rows.append(point("random exits", table, by_chance, name) | wanted)
                fewer = fewer_demonstrations(
                    self.plan,
                    self.model,
                    self.test_prompts,
                    flops=float(measured.flops.mean()),
                    costs=self.calibration.setup.costs,
                    tables=self._full_model,
                )
                if fewer is not None:
                    name, tokens, of_fewer = fewer
                    row = point("fewer demonstrations", table, of_fewer, name) | wanted
                    rows.append(row | {"keep": "", "kept": tokens})
        ours = [rule for (who, _), rule in rules.items() if who == "ours"]
        for table in self.shorter_prompts(ours):
            rows.append(point("shorter prompt", table, outcomes(table, FixedLayer(0)), "layer 0"))
        for keep in dict.fromkeys(rule.spade.name for rule in ours):
            table = next(t for t in tables if t.keep == keep)
            rows.append(point("oracle", table, outcomes(table, Oracle()), Oracle().name))
        frame = pd.DataFrame(rows)
        frame.insert(0, "model", self.model.name)
        frame.insert(1, "task", self.plan.decisions.name)
        return frame

    def sweeps(self, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Measure every policy on the test prompts: accuracy against compute.

        Thresholds by layer are those that the calibration prompts gave.
        """
        frames = []
        for calibration, table in self._pairs(tables):
            for family, policies in families(calibration, self.calibration.families).items():
                # Policies that read no lens are swept once, with the first check.
                if any(p.reads for p in policies) or table.check == self.checks[0].name:
                    frame = sweep(table, policies)
                    frame.insert(0, "family", family)
                    frames.append(frame)
        return self._of_task(frames)

    def exits(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Return where every test prompt exits, what it answers and what it costs, by rule."""
        frames = []
        for (who, loss), rule in rules.items():
            if who == FIXED:
                continue  # all at one layer
            frame = rule.table(tables).simulate(rule.policy).to_frame()
            wanted = "best accuracy" if loss is None else f"loss at most {loss:g}"
            frame["policy"] = f"{who}, {wanted}"
            frames.append(frame.drop(columns="seconds"))
        return self._of_task(frames)

    def iso_compute(self, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Return accuracy at equal compute, by check and keep set."""
        frames = []
        for calibration, table in self._pairs(tables):
            several = families(calibration, self.calibration.families)
            with suppress(ValueError):  # none of these policies stays within the budgets
                frames.append(iso_compute(calibration, table, several))
        return self._of_task(frames) if frames else pd.DataFrame(columns=["task"])

    def wall_clock(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Time our rules, and the paper's at the last loss, beside the plain model: a row for each.

        Rules that come to the same are timed once. The engine's exits are compared with the
        simulated ones; rounding may part them where a confidence lies on its threshold.
        ``wall_same`` is the fraction of prompts with the simulation's exit and answer.
        """
        prompts = self.test_prompts[: self.plan.timed]
        last = "the paper's", self.plan.losses[-1]
        rules = {key: rule for key, rule in rules.items() if key[0] == "ours" or key == last}
        distinct: dict[tuple[str, str, str], ExitRule] = {}
        for rule in rules.values():
            distinct.setdefault(_key(rule), rule)
        frame = self.parts(
            "wall-clock",
            ["all"],
            lambda _: self._time(list(distinct.values()), tables, prompts),
            run=self.calibration.setup.identity(prompts),
            rules=[[r.spade, r.confidence, r.policy] for r in distinct.values()],
            clock=[self.plan.rounds, torch.get_num_threads()],
        )
        measured = dict(zip(distinct, frame.to_dict("records"), strict=True))
        rows = [
            {"task": self.plan.decisions.name, "rule": who}
            | {"wanted": torch.nan if loss is None else loss}
            | measured[_key(rule)]
            for (who, loss), rule in rules.items()
        ]
        return pd.DataFrame(rows)

    def _time(
        self, rules: Sequence[ExitRule], tables: Sequence[ExitTable], prompts: Sequence[Prompt]
    ) -> pd.DataFrame:
        # A policy that never exits is a warning when it is chosen; once is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExitWarning)
            engines = [rule.engine() for rule in rules]
        rows = []
        for rule, engine in zip(rules, engines, strict=True):
            trace = engine.run(prompts)
            expected = rule.table(tables).of(range(len(prompts))).simulate(rule.policy)
            same = (trace.exit_layer == expected.exit_layer) & (trace.answer == expected.answer)
            if not same.all():
                warn(
                    f"With the policy {rule.policy.name!r} the engine differs from the simulation "
                    f"on {int((~same).sum())} of {len(prompts)} prompts.",
                    ExitWarning,
                )
            rows.append(
                {
                    "simulated_speedup": expected.speedup,
                    "wall_prompts": len(prompts),
                    "wall_same": float(same.double().mean()),
                }
            )
        timed = compare_wall_clock(engines, prompts, rounds=self.plan.rounds)
        measured = pd.DataFrame([t.to_dict() for t in timed])
        return pd.concat([pd.DataFrame(rows), measured.add_prefix("wall_")], axis=1)

    def _full_model(self, name: str, prompts: Sequence[Prompt]) -> ExitTable:
        """Return a table of prompts of which only the full model's answer is wanted."""
        [table] = self._tables(
            name, prompts, self._setup({PAPER_KEEP: Keep()}, self.checks[:1], [0])
        )
        return table

    def _of_task(self, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "task", self.plan.decisions.name)
        return frame

    def _prompts(self, split: str, n: int) -> list[Prompt]:
        plan = self.plan
        return plan.decisions.prompts(
            self.model.tokenizer,
            n,
            shots=plan.shots,
            seed=plan.seed,
            split=split,
            max_tokens=plan.max_tokens,
            fewer=True,
        )

    def _keep_sets(self) -> dict[str, KeepRule]:
        """Return the keep sets to choose from; those that are learned are learned here."""
        # Never from those that certify.
        most = len(self.calibration_prompts) // (1 if self.plan.guarantee is None else 2)
        prompts = self.calibration_prompts[: min(self.plan.learn_from, most)]
        return keep_sets(self.model, prompts, self.plan.keep, self.layers)

    def _pairs(self, tables: Sequence[ExitTable]) -> Iterator[tuple[ExitTable, ExitTable]]:
        """Yield the calibration and the test table of every keep set and check with both."""
        calibrated = {(t.keep, t.check): t for t in self.calibration.tables}
        for table in tables:
            if (table.keep, table.check) in calibrated:
                yield calibrated[table.keep, table.check], table

    def _setup(
        self,
        keeps: Mapping[str, KeepRule],
        checks: Sequence[Confidence | str],
        layers: Sequence[int] | None = None,
    ) -> Setup:
        spades = [Spade(self.model, keep=rule, name=name) for name, rule in keeps.items()]
        return Setup.of(self.model, checks, spades, self.layers if layers is None else layers)

    def _tables(self, name: str, prompts: Sequence[Prompt], setup: Setup) -> list[ExitTable]:
        """Return tables: those on disk if this very step is done already, else new ones."""
        folder = self.folder(name, run=setup.identity(prompts))
        if folder is None:
            return tables_of(setup, prompts)
        done = folder / "done.json"
        try:
            tables = _finished(done)
        except FileNotFoundError:
            pass
        except ValueError as error:
            set_aside(done, error)
        else:
            self.used_again.append(name)
            return tables
        tables = tables_of(setup, prompts, checkpoint=folder)
        for i, table in enumerate(tables):
            table.save(folder / str(i))
        write_json(done, {"tables": len(tables)})  # last, when all of them are there
        return _finished(done)


def _finished(done: Path) -> list[ExitTable]:
    content = read_json(done)
    with naming_damage(done, again="run it"):
        return [ExitTable.load(done.parent / str(i)) for i in range(content["tables"])]


def _key(rule: ExitRule) -> tuple[str, str, str]:
    """Return what rules differ by; the name of a policy may leave its thresholds out."""
    return rule.spade.name, rule.check, repr(rule.policy)
