"""The sweep of self-speculation: known texts, counted drafts, measured costs, timed settings.

Times are of one call of the study. Weights are packed once in it, which a single call of
:func:`spade_lens.generate` pays for itself.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from spade_lens.exits.sweeps import THESE
from spade_lens.generation.drafters import Drafter
from spade_lens.generation.known_text import KnownText, TextDrafts, record_drafts, rounds_of
from spade_lens.generation.loop import check_room, check_strategy, generate
from spade_lens.generation.speculate import Speculate
from spade_lens.models.clock import now
from spade_lens.models.model import Model
from spade_lens.models.places import check_below_last
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.content import content_sha256
from spade_lens.studies.base import Study, StudyResult, say, show_files
from spade_lens.studies.speculation.costs import CostModel, measure_costs
from spade_lens.studies.speculation.findings import speculation_findings
from spade_lens.studies.speculation.plan import SpeculationPlan
from spade_lens.studies.speculation.points import (
    RoundsOfText,
    Setting,
    by_prompt,
    geometric_mean,
    point,
    speeds,
    verdict,
)
from spade_lens.studies.speculation.prompts import prompts_by_kind

_PLAIN = Setting("", 0, 0)


class SpeculationStudy(Study[SpeculationPlan], plan=SpeculationPlan):
    """Sweeps drafters, draft lengths and ``eta``; see :class:`SpeculationPlan`."""

    def __init__(self, model: Model, plan: SpeculationPlan, *, fresh: bool = False) -> None:
        super().__init__(model, plan, fresh=fresh)
        self.several = plan.several(model.n_layers)
        if not self.several:
            raise ValueError(
                f"Nothing drafts: {model.name} has no layer between its first and its last, and "
                "lookups=False was given. Give lookups=True or drafters."
            )
        for (name, layer), drafters in self.several.items():
            check_strategy(model, Speculate(drafters))
            check_below_last(model, layer, f"The drafter {name!r} reads layer {layer}")
        self._warm = False
        self.prompts: list[Prompt] = []
        self.kind_of: list[str] = []
        for kind, given in prompts_by_kind(plan.prompts).items():
            if plan.prompts is None and kind != "free text" and not _chats(model):
                continue
            some = model.prompts(given)[: plan.samples]
            self.prompts += some
            self.kind_of += [kind] * len(some)
        for i, prompt in enumerate(self.prompts):
            check_room(model, i, prompt, plan.max_new_tokens)

    @property
    def drafts(self) -> tuple[int, ...]:
        """The draft lengths."""
        return tuple(self.plan.drafts)  # type: ignore[arg-type]

    @property
    def etas(self) -> tuple[float, ...]:
        """The values of ``eta``."""
        return tuple(self.plan.eta)  # type: ignore[arg-type]

    def identity(self) -> dict[str, Any]:
        """Return what decides all parts of this study."""
        tokens = [prompt.tokens for prompt in self.prompts]
        return {"prompts": tokens, "max_new_tokens": self.plan.max_new_tokens}

    def run(self) -> StudyResult:
        """Sweep, time what is predicted to be fastest, print the table, and write everything."""
        model, plan = self.model, self.plan
        say(
            f"{model.name}: {model.n_layers} layers, sha256 {model.sha256[:12]}. "
            f"{len(self.prompts)} prompts, at most {plan.max_new_tokens} new tokens each."
        )
        rounds = self.rounds()
        settings = self.chosen(rounds)
        times = self.times(settings) if settings else pd.DataFrame()
        frames = {
            "points": self.points(rounds, times),
            "by-prompt": pd.concat([self.by_prompt(s, r) for s, r in rounds.items()]),
            "drafts": self.compared_drafts(),
            "costs": self.costs,
        }
        frames |= {"times": times} if settings else {}
        if self.used_again:
            say(f"Read from {self.out / 'parts'}, not again: {', '.join(self.used_again)}.")
        findings = speculation_findings(frames, plan, clock=self.clock)
        result = self.write(
            findings,
            name="speculate",
            drafters=[name for name, _ in self.several],
            n_prompts=len(self.prompts),
            kinds=list(dict.fromkeys(self.kind_of)),
            threads=torch.get_num_threads(),
            clock=self.clock,
        )
        say(f"\n{result.text}\n")
        show_files(result.files)
        return result

    @property
    def clock(self) -> str:
        """What decides whether a setting is faster."""
        return "wall-clock time" if self.model.device.type == "cuda" else "CPU time"

    @cached_property
    def texts(self) -> list[KnownText]:
        """The greedy texts."""
        n = self.plan.max_new_tokens

        def write(_: str) -> pd.DataFrame:
            written = generate(self.prompts, n, model=self.model)
            return written.to_frame()[["prompt", "step", "token_id"]]

        frame = self.parts("texts", ["all"], write)
        new = frame.groupby("prompt")["token_id"].agg(list)
        return [KnownText(p.tokens, new[i], n) for i, p in enumerate(self.prompts)]

    @cached_property
    def costs(self) -> pd.DataFrame:
        """What the parts of a round cost, after a prompt of the mean length."""
        lengths = [len(prompt) for prompt in self.prompts]
        middle = self.plan.max_new_tokens // 2
        longest = max(self.prompts, key=len)
        length = min(sum(lengths) // len(lengths) + middle, self.model.n_ctx - max(self.drafts) - 2)
        tokens = (longest.tokens * (1 + length // len(longest)))[: max(1, length)]
        most = max(self.drafts)
        return self.parts(
            "costs",
            ["all"],
            lambda _: measure_costs(
                self.model, self.several, Prompt(tokens=tokens), most, seed=self.plan.seed
            ),
            tokens=tokens,
            draft_tokens=most,
            drafters={f"{n} at {at}": content_sha256(d) for (n, at), d in self.several.items()},
            threads=torch.get_num_threads(),
        )

    @cached_property
    def recorded(self) -> dict[tuple[str, int], list[TextDrafts]]:
        """What every drafter at a layer drafts in the texts."""
        return {key: self._record(*key) for key in self.several if key[1]}

    def _record(self, name: str, layer: int) -> list[TextDrafts]:
        drafter: Any = self.several[name, layer][-1]
        eta = min((eta for eta in self.etas if eta), default=None)

        def record(_: str) -> pd.DataFrame:
            recorded = record_drafts(
                drafter, self.texts, model=self.model, draft_tokens=max(self.drafts), eta=eta
            )
            rows = [
                (prompt, step, depth, token if not depth else -1, sure)
                for prompt, drafts in enumerate(recorded)
                for step, token in enumerate(drafts.tokens)
                for depth, sure in enumerate([drafts.confidence[step], *drafts.beyond[step]])
            ]
            return pd.DataFrame(rows, columns=["prompt", "step", "depth", "token_id", "confidence"])

        frame = self.parts(
            f"{name} at {layer}",
            ["all"],
            record,
            drafter=content_sha256(drafter),
            draft_tokens=max(self.drafts),
            eta=eta,
        )
        recorded = [TextDrafts() for _ in self.texts]
        columns = ("prompt", "step", "depth", "token_id", "confidence")
        for i, step, depth, token, sure in zip(*(frame[c].tolist() for c in columns), strict=True):
            if depth:
                recorded[i].beyond[step].append(sure)
            else:
                recorded[i].tokens.append(token)
                recorded[i].confidence.append(sure)
                recorded[i].beyond.append([])
        return recorded

    def rounds(self) -> dict[Setting, list[RoundsOfText]]:
        """Count the rounds of every setting in every text."""
        found: dict[Setting, list[RoundsOfText]] = {}
        for (name, layer), drafters in self.several.items():
            at_layer: Sequence[Any] = (
                self.recorded[name, layer] if layer else [None] * len(self.texts)
            )
            for eta in self.etas if layer else (0.0,):
                for n in self.drafts:
                    found[Setting(name, layer, n, eta)] = [
                        rounds_of(text, drafters, n, eta, drafts, self.model.d_vocab)
                        for text, drafts in zip(self.texts, at_layer, strict=True)
                    ]
        if self.plan.lookups:  # how long they are depends on what was accepted, so they run
            setting = Setting("lookups", 0, max(self.drafts), adaptive=True)
            found[setting] = self._rounds_as_run(setting)
        return found

    def _rounds_as_run(self, setting: Setting) -> list[RoundsOfText]:
        def run(_: str) -> pd.DataFrame:
            written = generate(
                self.prompts,
                self.plan.max_new_tokens,
                model=self.model,
                strategy=self._strategy(setting),
            )
            rows = written.rounds.tolist()
            return pd.DataFrame(rows, columns=["prompt", "n_drafted", "n_accepted"])

        frame = self.parts("lookups as long as pays", ["all"], run, setting=setting.to_dict())
        several: list[RoundsOfText] = []
        for prompt, text in enumerate(self.texts):
            rows = frame[frame["prompt"] == prompt]
            pairs = list(zip(rows["n_drafted"], rows["n_accepted"], strict=True))
            before = sum(accepted + 1 for _, accepted in pairs[:-1])
            news = [accepted + 1 for _, accepted in pairs[:-1]] + [len(text.new) - before]
            several.append([(d, a, n) for (d, a), n in zip(pairs, news, strict=True)])
        return several

    def by_prompt(self, setting: Setting, rounds: Sequence[RoundsOfText]) -> pd.DataFrame:
        """Return a row for every prompt."""
        return by_prompt(setting, rounds, self.kind_of, self._cost(setting))

    def points(
        self, rounds: Mapping[Setting, list[RoundsOfText]], times: pd.DataFrame
    ) -> pd.DataFrame:
        """Summarise every setting, for all prompts and for every kind."""
        measured = speeds(times) if len(times) else None
        rows = []
        for setting, several in rounds.items():
            frame = self.by_prompt(setting, several)
            own = None if measured is None else _of(measured, setting)
            same = None if measured is None else _of(times, setting)
            for kind in self._all_kinds():
                chosen = [i for i, k in enumerate(self.kind_of) if kind in ("all", k)]
                row = point(
                    *(setting, kind, frame.iloc[chosen], [several[i] for i in chosen]),
                    self._cost(setting),
                    self.model.n_layers,
                )
                if own is not None and same is not None and len(own):
                    here = own[own["prompt"].isin(chosen)]
                    for clock in ("wall_speedup", "cpu_speedup"):
                        row |= geometric_mean(clock, here[clock])
                    name = "wall_speedup" if self.model.device.type == "cuda" else "cpu_speedup"
                    row["verdict"] = verdict(row[f"{name}_low"], row[f"{name}_high"])
                    row["chosen_on"] = "" if setting.adaptive else THESE
                    row["same_tokens"] = float(same[same["prompt"].isin(chosen)]["same"].mean())
                rows.append(row)
        frame = pd.DataFrame(rows)
        if "verdict" in frame.columns:
            said = ["verdict", "chosen_on"]
            frame[said] = frame[said].fillna("")
        frame.insert(0, "model", self.model.name)
        return frame

    def chosen(self, rounds: Mapping[Setting, list[RoundsOfText]]) -> list[Setting]:
        """Return the settings that are timed: those predicted to be fastest on these prompts."""
        if not self.plan.timed:
            return []
        predicted = {
            setting: geometric_mean("x", self.by_prompt(setting, several)["predicted_speedup"])["x"]
            for setting, several in rounds.items()
            if not setting.adaptive
        }
        # A setting without a prediction, of texts of one token, stands last.
        order = sorted(predicted, key=lambda s: -predicted[s] if predicted[s] > 0 else 0.0)
        best: dict[str, Setting] = {}
        for setting in order:
            best.setdefault(setting.drafter, setting)
        ranked = dict.fromkeys([*best.values(), *order])
        chosen = list(ranked)[: max(self.plan.timed, len(best))]
        return [*chosen, *(setting for setting in rounds if setting.adaptive)]

    def times(self, settings: Sequence[Setting]) -> pd.DataFrame:
        """Write every prompt plainly and by the settings, in turns, and time it."""
        names = {f"prompt-{i:04}": i for i in range(len(self.prompts))}
        return self.parts(
            "times",
            list(names),
            lambda name: self._time(names[name], settings),
            settings=[setting.to_dict() for setting in settings],
            drafters=[content_sha256(self._drafters(setting)) for setting in settings],
            rounds=self.plan.rounds,
            threads=torch.get_num_threads(),
        )

    def _time(self, i: int, settings: Sequence[Setting]) -> pd.DataFrame:
        model, n = self.model, self.plan.max_new_tokens
        rows = []
        # Nothing comes after the prompt's own token in a text of one.
        known = 1.0 if len(self.texts[i].new) > 1 else math.nan
        # The first prompt's first turn is not counted: weights are packed in it.
        first, self._warm = (0 if self._warm else -1), True
        for turn in range(first, self.plan.rounds):
            for whole in (True, False):
                for setting in (_PLAIN, *settings):
                    strategy = self._strategy(setting)
                    wall, cpu = now(torch.device("cpu")), now(model.device, of_process=True)
                    written = generate(
                        self.prompts[i], n if whole else 1, model=model, strategy=strategy
                    )
                    cpu = now(model.device, of_process=True) - cpu
                    row = setting.to_dict() | {"prompt": i, "kind": self.kind_of[i], "turn": turn}
                    row |= {"whole": whole, "same": self._same(i, written.tokens[0])}
                    wall = now(torch.device("cpu")) - wall
                    row |= {"wall_seconds": known * wall, "cpu_seconds": known * cpu}
                    rows += [row] if turn >= 0 else []
        return pd.DataFrame(rows)

    def _same(self, i: int, tokens: Sequence[int]) -> bool:
        return list(tokens) == list(self.texts[i].new)[: len(tokens)]

    def _strategy(self, setting: Setting) -> Speculate | None:
        if not setting.drafter:
            return None
        return Speculate(
            self._drafters(setting), setting.draft_tokens, setting.eta, adaptive=setting.adaptive
        )

    def _drafters(self, setting: Setting) -> tuple[Drafter, ...]:
        return self.several[setting.drafter, setting.layer]

    def _cost(self, setting: Setting) -> CostModel:
        return CostModel.of(self.costs, setting.drafter, setting.layer, self.model.n_layers)

    def _all_kinds(self) -> list[str]:
        several = list(dict.fromkeys(self.kind_of))
        return ["all", *several] if len(several) > 1 else ["all"]

    def compared_drafts(self) -> pd.DataFrame:
        """Return the draft of every new token by every drafter at a layer, and if it is right."""
        rows = [
            (name, layer, prompt, self.kind_of[prompt], step, token == text.new[step], sure)
            for (name, layer), recorded in self.recorded.items()
            for prompt, (text, drafts) in enumerate(zip(self.texts, recorded, strict=True))
            for step, (token, sure) in enumerate(zip(drafts.tokens, drafts.confidence, strict=True))
        ]
        columns = ["drafter", "layer", "prompt", "kind", "step", "accepted", "confidence"]
        return pd.DataFrame(rows, columns=columns)


def _of(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Return the rows of one setting."""
    same = [frame[name] == value for name, value in setting.to_dict().items()]
    return frame[pd.concat(same, axis=1).all(axis=1)]


def _chats(model: Model) -> bool:
    return bool(getattr(model.tokenizer, "chat_template", None))
