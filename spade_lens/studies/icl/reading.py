"""The experiment that decodes rule vectors into tokens: is the label read in them?"""

import pandas as pd

from spade_lens.icl.decoded_tokens import decoded_tokens
from spade_lens.icl.vectors import rule_vectors
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.report.grid import grid, spread
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy


@experiment("reading")
def reading(study: IclStudy) -> Findings:
    """Decode rule vectors by SPADE, the logit lens and a patchscope."""
    model, plan, layers = study.model, study.plan, study.some_layers()
    prompts = study.prompts[: plan.few]

    def decode(_: str) -> pd.DataFrame:
        vectors = rule_vectors(model, prompts, layers=layers)
        frame = decoded_tokens(model, vectors, top_k=plan.top_k, seed=plan.seed)
        labels = [[_word(model, prompt, at) for at in prompt.spans["labels"]] for prompt in prompts]
        places = zip(frame["prompt"], frame["demo"], strict=True)
        words = pd.Series([labels[prompt][demo] for prompt, demo in places], index=frame.index)
        top = [f"top_{k}" for k in range(1, plan.top_k + 1) if f"top_{k}" in frame.columns]
        return frame.assign(
            label=words,
            first_is_label=frame["top_1"] == words,
            holds_label=frame[top].eq(words, axis=0).any(axis=1),
        )

    frame = study.parts("reading", ["all"], decode, few=plan.few, layers=layers, top_k=plan.top_k)
    summary = pd.concat(
        summarise(frame, value, by=["method", "control", "layer"])
        for value in ("first_is_label", "holds_label")
    )
    first = summary[
        (summary["measure"] == "first_is_label") & summary["layer"].isin(spread(layers))
    ]
    kind = first["control"].map({False: "", True: "random vectors"})
    text = (
        f"{len(prompts)} prompts. How often the top token of a rule vector is the label at its "
        "position, by layer\n\n"
        f"{grid(first.assign(control=kind), ['method', 'control'], 'layer')}"
    )
    return Findings({"": frame, "summary": summary}, text=text)


def _word(model: Model, prompt: Prompt, position: int) -> str:
    """Return a token's text, as readings give it."""
    return str(model.tokenizer.decode([prompt.tokens[position]]))
