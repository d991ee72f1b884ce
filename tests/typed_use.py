"""What a user may write, for strict type checkers. `make types` checks it; nothing runs it."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

import spade_lens as sl
from spade_lens.exits import Confidence, Own, SpadeExit, Threshold
from spade_lens.generation import (
    Deal,
    ExitPrefill,
    PromptLookup,
    Sampling,
    Speculate,
    TokenExit,
    heuristics,
)
from spade_lens.icl import Condition, RuleVectors, patch_sweep, rule_vectors
from spade_lens.stats import summarise


class Halved:
    """A lens of one's own: the logit lens on half of the residual."""

    name = "half"

    def __init__(self, model: sl.Model) -> None:
        self.model = model

    def keep(self, prompt: sl.Prompt, answer: int) -> tuple[int, ...]:
        return (answer,)

    def final_residuals(
        self,
        residuals: sl.Residuals,
        readings: Sequence[sl.lenses.Reading],
        layers: Sequence[int],
    ) -> Float[Tensor, "layer reading d_model"]:
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        return torch.stack([residuals.layer(n)[slots] / 2 for n in layers])


def read(model: sl.Model, text: str) -> pd.DataFrame:
    readout: sl.Readout = sl.read(text, [sl.LogitLens(model), sl.Spade(model), "spade"])
    with sl.Settings(progress=False, memory_limit=1):
        figure: Figure = sl.plot(summarise(readout))
    print(figure)
    return readout.to_frame()


def write(model: sl.Model) -> list[str]:
    residuals = sl.capture(model, "ab", layers=[1, 2], positions="last")
    added = sl.Patch(2, positions="last", values=residuals.layer(2)[0], mode="add")
    print(len(sl.patch("ab", [added], model=model).to_frame()))
    sampled = sl.generate("ab", 8, model=model, sampling=Sampling(seed=1))
    texts = list(sampled.texts)
    searched = Deal(heuristics.KeywordCoverage(["a"]))
    for strategy in (Speculate(PromptLookup(2)), ExitPrefill(2), TokenExit([1, 2]), searched):
        texts += sl.generate("ab", 8, model=model, strategy=strategy).texts
    return texts


def leave(model: sl.Model) -> float:
    task = sl.task("antonym")
    assert isinstance(task, sl.tasks.WordPairTask)
    prompts = task.decisions().prompts(model.tokenizer, 20)
    check = Confidence(sl.LogitLens(model))
    found = sl.calibrate(model, prompts, checks=[check, Own(after=check)], keep=sl.Keep(last=2))
    trace = found.best(0.01).engine().run(prompts)
    by_hand = SpadeExit(model, check, Threshold(0.9), layers=[1, 2]).run(prompts)
    return max(trace.speedup, by_hand.speedup)


def rules(model: sl.Model, folder: Path) -> RuleVectors:
    words = {"animal": ("horse", "cow"), "country": ("France", "Peru")}
    episodes = sl.tasks.RuleTask("mine", words).episodes(4, shots=2)
    sweep = patch_sweep(model, episodes, layers=[1], conditions=[Condition("own")], folder=folder)
    print(sweep.summary())
    plan = sl.studies.IclPlan("animal/country", "patching", samples=4, out=folder)
    print(sl.study(model, plan).tables)
    return rule_vectors(model, episodes, layers=1)


def main() -> None:
    model: sl.Model = sl.load("smollm2-135m-instruct")
    print(read(model, "The Eiffel Tower is in"), write(model), leave(model))
    rules(model, Path("rules")).save("vectors")
    sl.fit("l-spade", model).save("lens")
