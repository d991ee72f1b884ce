"""The study of learning in context: train, measure, and hold against what is known exactly."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spade_lens.stats.summary import summarise
from spade_lens.storage.files import output_folder
from spade_lens.studies.base import Study, StudyResult, say, show_files
from spade_lens.studies.in_context.findings import in_context_findings
from spade_lens.studies.in_context.pasting import paired_differences, paste
from spade_lens.studies.in_context.plan import InContextPlan
from spade_lens.studies.in_context.probes import probe_table
from spade_lens.studies.in_context.risk import ratios, squared_errors
from spade_lens.studies.in_context.selection import selection_table
from spade_lens.studies.in_context.validation import Validation
from spade_lens.training.in_context.fitted import TrainedInContext, train_in_context
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import Drawn

_FIT, _TEST, _PASTE = 1, 2, 3
_FEW = 256
"""Prompts of the validation, each of which runs many times."""


class InContextStudy(Study[InContextPlan], plan=InContextPlan):
    """Networks of several seeds, trained or found again, and what was measured on them."""

    def identity(self) -> dict[str, Any]:
        """Return what decides all parts of this study."""
        names = ("task", "size", "training", "batch", "layers")
        config = self.plan.config
        return {name: config[name] for name in names}

    def run(self) -> StudyResult:
        """Train, measure, print the table, and write everything."""
        frames: dict[str, list[pd.DataFrame]] = {}
        for seed in self.plan.seeds:
            trained = self.trained(seed)
            for name, frame in self.measured(seed, trained).items():
                frames.setdefault(name, []).append(frame.assign(seed=seed))
            frames.setdefault("history", []).append(trained.history.assign(seed=seed))
        tables = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
        if self.used_again:
            say(f"Read from {self.out / 'parts'}, not again: {', '.join(self.used_again)}.")
        result = self.write(in_context_findings(tables), name="in-context")
        say(f"\n{result.text}\n")
        show_files(result.files)
        return result

    def trained(self, seed: int) -> TrainedInContext:
        """Train the network of a seed, or go on from its checkpoint."""
        task, size, training = self.plan.of(seed)
        started = time.process_time()
        trained = train_in_context(
            task, size=size, plan=training, batch=self.plan.batch, checkpoint=self._place(seed)
        )
        say(
            f"Seed {seed}: {training.steps} steps, "
            f"{time.process_time() - started:.0f} seconds of the processor in this run."
        )
        return trained

    def measured(self, seed: int, trained: TrainedInContext) -> dict[str, pd.DataFrame]:
        """Return the tables of a seed, by name."""
        plan, frames = self.plan, {}
        if "risk" in plan.parts:
            errors = self._part("errors", seed, lambda: self._errors(seed, trained))
            frames["risk"] = summarise(errors, "squared_error", by=["predictor", "shots"])
            frames["ratios"] = ratios(errors)
        if "probes" in plan.parts:
            frames["probes"] = self._part("probes", seed, lambda: self._probes(seed, trained))
        supervised = trained.network.task.form == "supervised"
        alone = supervised and trained.network.task.representations == 1
        if "pasting" in plan.parts and plan.paste_steps and supervised:
            pasted = self._part("pasted", seed, lambda: self._pasted(seed, trained))
            by = ["upper", "read_in", "parameters"]
            frames["pasting"] = summarise(pasted, "squared_error", by=by)
            frames["pasting-differences"] = paired_differences(pasted)
        if "validation" in plan.parts and alone:
            frames["validation"] = self._part(
                "validation", seed, lambda: self._validation(seed, trained)
            )
        if "selection" in plan.parts and supervised and not alone:
            frames["selection"] = self._part(
                "selection", seed, lambda: self._selection(seed, trained)
            )
        return frames

    def drawn(self, seed: int, use: int, n: int | None = None) -> tuple[int, Drawn]:
        """Return prompts for a use, and the seed that they were drawn with."""
        task, *_ = self.plan.of(seed)
        [of_both] = np.random.SeedSequence([self.plan.seed, seed, use]).generate_state(1)
        return int(of_both), task.draw(n or self.plan.prompts, seed=int(of_both))

    def _part(self, name: str, seed: int, make: Any) -> pd.DataFrame:
        deciding = {"of": seed, "prompts": self.plan.prompts, "seed": self.plan.seed}
        if name == "pasted":
            deciding["steps"] = self.plan.paste_steps
        return self.parts(f"{name} {seed}", ["all"], lambda _: make(), **deciding)

    def _compared(
        self, seed: int, trained: TrainedInContext
    ) -> tuple[dict[str, InContextNetwork], Drawn, Drawn]:
        """Return both networks, prompts that probes are fitted on, and others."""
        networks = {"trained": trained.network, "untrained": trained.untrained}
        return networks, self.drawn(seed, _FIT)[1], self.drawn(seed, _TEST)[1]

    def _selection(self, seed: int, trained: TrainedInContext) -> pd.DataFrame:
        compared = self._compared(seed, trained)
        return selection_table(*compared, layers=self.plan.chosen_layers, seed=seed)

    def _errors(self, seed: int, trained: TrainedInContext) -> pd.DataFrame:
        of_draws, drawn = self.drawn(seed, _TEST)
        return squared_errors(trained.network, trained.untrained, drawn, seed=of_draws)

    def _probes(self, seed: int, trained: TrainedInContext) -> pd.DataFrame:
        compared = self._compared(seed, trained)
        return probe_table(*compared, layers=self.plan.chosen_layers)

    def _pasted(self, seed: int, trained: TrainedInContext) -> pd.DataFrame:
        of_draws, _ = self.drawn(seed, _PASTE, 1)
        n_layers = trained.network.size.n_layers
        probes = self._part("probes", seed, lambda: self._probes(seed, trained))
        return paste(
            trained.network,
            trained.untrained,
            cut_of(probes, n_layers),
            self.plan.paste_steps,
            n=self.plan.prompts,
            seed=of_draws,
            checkpoint=self._place(seed) / "pasted",
        )

    def _validation(self, seed: int, trained: TrainedInContext) -> pd.DataFrame:
        _, drawn = self.drawn(seed, _TEST, min(_FEW, self.plan.prompts))
        return Validation(trained.network, drawn).table(self.plan.chosen_layers)

    def _place(self, seed: int) -> Path:
        if self.plan.checkpoints is not None:
            return output_folder(Path(self.plan.checkpoints) / f"seed-{seed}")
        folder = self.folder(f"training {seed}", seed=seed)
        assert folder is not None
        return output_folder(folder)


def cut_of(probes: pd.DataFrame, n_layers: int) -> int:
    """Return the layer to cut at: where Phi is read best at x-tokens, of those that can be cut."""
    rows = probes[
        (probes["network"] == "trained")
        & (probes["place"] == "x")
        & (probes["quantity"] == "Phi(x)")
        & probes["layer"].between(1, n_layers - 1)
    ]
    if rows.empty:
        return max(1, n_layers // 2)
    return int(rows.sort_values("probe_error")["layer"].tolist()[0])
