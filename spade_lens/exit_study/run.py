"""The study: choose on calibration prompts, measure on others, race against the plain model."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spade_lens import report
from spade_lens.exit_study.plan import ExitPlan
from spade_lens.exits import (
    Calibration,
    Confidence,
    ExitRule,
    ExitTable,
    ExitWarning,
    FixedLayer,
    Oracle,
    attention_keep,
    calibrate,
    certify,
    exit_tables,
    families,
    global_thresholds,
    greedy_keep,
    iso_compute,
    keep_family,
    load_table,
    race,
    simulate,
    sweep,
)
from spade_lens.lenses import Lens
from spade_lens.lenses.keep import KeepRule
from spade_lens.models import Model
from spade_lens.prompts import Prompt

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
        progress: Show progress bars.
    """

    def __init__(
        self,
        model: Model,
        plan: ExitPlan,
        checks: Sequence[Confidence | Lens],
        *,
        progress: bool = True,
    ) -> None:
        self.model, self.plan, self.progress = model, plan, progress
        self.checks = [c if isinstance(c, Confidence) else Confidence(c) for c in checks]
        self.layers = plan.candidate_layers(model.n_layers)
        self.calibration_prompts = self._prompts("calibration", plan.calibration)
        self.test_prompts = self._prompts("test", plan.samples)
        model.check_prompts([*self.calibration_prompts, *self.test_prompts])
        plan.check_guarantee(len(self.calibration_prompts))
        self.keeps = self._keep_sets()
        self.found = self._calibration(
            "calibration", self.calibration_prompts, self.keeps, self.checks
        )

    def rules(self) -> Rules:
        """The ways to exit that are measured, by who made them and the loss wanted."""
        chosen: Rules = {}
        for loss in self.plan.losses:
            chosen["ours", loss] = self.found.best(loss)
            if PAIR in self.found.spades:
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
        part = Calibration(
            [t.of(first) for t in self.found.tables], self.found.spades, self.found.confidences
        )
        rule = part.best(plan.guarantee, family="threshold")
        table = self.found.table(rule).of(second)
        choice = certify(global_thresholds(), table, loss=plan.guarantee, risk=plan.risk)
        return ExitRule(rule.spade, rule.confidence, "threshold, certified", choice, rule.layers)

    def test_tables(self, rules: Sequence[ExitRule]) -> list[ExitTable]:
        """What the test prompts say of the keep sets chosen, and of the paper's."""
        names = {PAIR, *(rule.spade.name for rule in rules)}
        keeps = {name: rule for name, rule in self.keeps.items() if name in names}
        # The top-1 probability alone claims to be a chance, which reliability is about.
        checks = [*self.checks, Confidence(self.checks[0].lens, "top-1")]
        return list(self._calibration("test", self.test_prompts, keeps, checks).tables)

    def shorter_prompts(self, rules: Sequence[ExitRule]) -> list[ExitTable]:
        """The control: the tokens kept, and no others, from the embedding on."""
        spades = list({rule.spade.name: rule.spade for rule in rules}.values())

        def run(folder: Path) -> list[ExitTable]:
            return exit_tables(
                self.model,
                self.test_prompts,
                self.checks[0],
                spades=spades,
                layers=[0],
                checkpoint=folder,
                progress=self.progress,
            )

        names = [spade.name for spade in spades]
        return self._kept("shorter-prompts", self.test_prompts, names, [0], run)

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
                    **{k: v for k, v in row.items() if k not in ("model", "lens", "spade")},
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
            table = next(t for t in tables if t.spade == name)
            rows.append(self._control("oracle", table, Oracle()))
        frame = pd.DataFrame(rows)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def sweeps(self, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Every policy of every family on the test prompts: accuracy against compute."""
        frames = []
        for table in tables:
            for family, policies in families(table).items():
                if policies and (policies[0].reads or table.lens == self.checks[0].name):
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
        for table in tables:
            before = [
                t for t in self.found.tables if (t.spade, t.lens) == (table.spade, table.lens)
            ]
            for calibration in before:
                several = {k: v for k, v in families(calibration).items() if v}
                frames.append(iso_compute(calibration, table, several, seed=self.plan.seed))
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def race(self, rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
        """Seconds beside the plain model's, on some of the test prompts.

        All of ours are run, and the paper's at the last of the losses wanted.

        Raises:
            RuntimeError: If the engine does not do what was simulated.
        """
        prompts, wanted = self.test_prompts[: self.plan.race], self.plan.losses[-1]
        rules = {k: rule for k, rule in rules.items() if k[0] == "ours" or k[1] == wanted}
        names = [[*who, r.spade.name, r.check, r.policy.name] for who, r in rules.items()]
        place = self._part("race", prompts, names, self.layers)
        done = place.with_suffix(".csv")
        if not done.exists():
            place.parent.mkdir(exist_ok=True)
            report.write_csv(done, self._race(rules, tables, prompts))
        return pd.read_csv(done)

    def _race(
        self, rules: Rules, tables: Sequence[ExitTable], prompts: Sequence[Prompt]
    ) -> pd.DataFrame:
        # A policy that never exits is a warning when it is chosen; once is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExitWarning)
            engines = [rule.engine() for rule in rules.values()]
        rows = []
        for ((who, loss), rule), engine in zip(rules.items(), engines, strict=True):
            trace = engine.run(prompts, progress=self.progress)
            expected = simulate(_of(tables, rule).of(range(len(prompts))), rule.policy)
            same = torch.equal(trace.exit_layer, expected.exit_layer)
            if not same or not torch.equal(trace.answer, expected.answer):
                raise RuntimeError(
                    f"The engine with the policy {rule.policy.name!r} does not do what was "
                    "simulated. Please report this."
                )
            rows.append(
                {
                    "task": self.plan.task.name,
                    "rule": who,
                    "wanted": torch.nan if loss is None else loss,
                    "wall_prompts": len(prompts),
                    "simulated_speedup": expected.speedup,
                }
            )
        timed = race(engines, prompts, rounds=self.plan.rounds, progress=self.progress)
        measured = pd.DataFrame([t.to_dict() for t in timed])
        return pd.concat([pd.DataFrame(rows), measured.add_prefix("wall_")], axis=1)

    def _control(self, rule: str, table: ExitTable, policy: FixedLayer | Oracle) -> dict[Any, Any]:
        row = sweep(table, [policy], seed=self.plan.seed).iloc[0].to_dict()
        return {
            "rule": rule,
            "wanted": torch.nan,
            "keep": table.spade,
            "kept": float(table.kept.double().mean()),
            "check": "",
            "family": "",
            **{k: v for k, v in row.items() if k not in ("model", "lens", "spade")},
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
        return {name: known.get(name) or self._learned(name, list(known)) for name in wanted}

    def _learned(self, name: str, known: Sequence[str]) -> KeepRule:
        match = re.fullmatch(r"(attention|learned) (\d+)", name)
        if match is None:
            raise ValueError(
                f"There is no keep set {name!r} for these prompts. Expected one of {list(known)}, "
                "'attention N' or 'learned N'."
            )
        some = self.calibration_prompts[:_LEARN_FROM]
        middle, size = self.layers[len(self.layers) // 2], int(match[2])
        if match[1] == "attention":
            found = attention_keep(self.model, some, size=size, layer=middle)
        else:
            found = greedy_keep(
                self.model, some, size=size, layers=[middle], progress=self.progress
            )[-1]
        return replace(found, name=name)

    def _calibration(
        self,
        name: str,
        prompts: Sequence[Prompt],
        keeps: Mapping[str, KeepRule],
        checks: Sequence[Confidence],
    ) -> Calibration:
        def run(folder: Path) -> list[ExitTable]:
            return list(made(checkpoint=folder, tables=None).tables)

        def made(**more: Any) -> Calibration:
            return calibrate(
                self.model,
                prompts,
                keep=keeps,
                checks=checks,
                layers=self.layers,
                progress=self.progress,
                **more,
            )

        return made(tables=self._kept(name, prompts, list(keeps), self.layers, run))

    def _kept(
        self,
        name: str,
        prompts: Sequence[Prompt],
        keeps: Sequence[str],
        layers: Sequence[int],
        run: Callable[[Path], list[ExitTable]],
    ) -> list[ExitTable]:
        """Tables from disk, where this very step is done already; else made and kept there."""
        place = self._part(name, prompts, keeps, layers)
        done = place / "done.json"
        if not done.exists():
            tables = run(place)
            for i, table in enumerate(tables):
                table.save(place / str(i))
            report.write_json(done, {"tables": len(tables)})
        n = json.loads(done.read_text())["tables"]
        return [load_table(place / str(i)) for i in range(n)]

    def _part(self, name: str, prompts: Sequence[Prompt], ways: Any, layers: Sequence[int]) -> Path:
        """A place on disk, named by everything that decides what will be there."""
        deciding = {
            "versions": report.versions(),
            "model": [self.model.name, self.model.sha256, str(self.model.dtype)],
            "prompts": [[p.tokens, p.answer, p.candidates] for p in prompts],
            "checks": [[c.name, getattr(c.lens, "about", None)] for c in self.checks],
            "ways": ways,
            "layers": list(layers),
        }
        text = json.dumps(deciding, default=str)
        return self.plan.out / "parts" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _of(tables: Sequence[ExitTable], rule: ExitRule) -> ExitTable:
    """The table of a rule's keep set and check."""
    names = rule.spade.name, rule.confidence.name
    return next(t for t in tables if (t.spade, t.lens) == names)
