"""Every table of in-context learning speaks the one vocabulary, and results draw themselves."""

import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from spade_lens import Model, Prompt, icl
from spade_lens.columns import COLUMNS
from spade_lens.icl.geometry.dpca_projections import factor_projections
from spade_lens.prompts import Template
from spade_lens.tasks import RuleTask

pytestmark = pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = icl.PromptSetup(TIGHT, ("z",))
TASK = RuleTask("t", {"x": tuple("abcdefg"), "y": tuple("hijklmn")})
EPISODES = TASK.episodes(32, shots=4)
FEW = EPISODES[:4]


def prompts(model: Model) -> list[Prompt]:
    return SETUP.prompts(model, FEW)


def vectors(model: Model) -> icl.RuleVectors:
    return icl.rule_vectors(model, EPISODES, layers=[1, 2], setup=SETUP)


TABLES: dict[str, Callable[[Model], Any]] = {
    "shots": lambda m: icl.accuracy_by_shots(m, TASK, n=2, shots=2, setup=SETUP),
    "patching": lambda m: icl.patch_sweep(m, FEW, layers=2, setup=SETUP).to_frame(),
    "contributions": lambda m: icl.measure_contributions(m, FEW, layers=2, setup=SETUP),
    "effects": lambda m: icl.head_effects(m, FEW, n=1, blocks=2, setup=SETUP),
    "knockout": lambda m: icl.knockout(m, prompts(m), windows=[(0, 2)]),
    "saliency": lambda m: icl.saliency_flows(m, prompts(m)),
    "vectors": lambda m: vectors(m).to_frame(),
    "convergence": lambda m: icl.convergence(vectors(m)),
    "probe": lambda m: icl.probe(vectors(m), vectors(m).labels),
    "variance": lambda m: icl.factor_variance(vectors(m)),
    "projections": lambda m: factor_projections(vectors(m)),
    "decoded": lambda m: icl.decoded_tokens(m, vectors(m), top_k=2),
    # Beside these, the columns of a readout.
    "sufficiency": lambda m: icl.sufficiency_map(m, prompts(m), layers=2)[
        ["lens", "of", "control", "kept", "layer", "prompt", "agrees"]
    ],
    "smallest": lambda m: icl.smallest_sets(m, prompts(m), layers=2, units="pieces"),
}


@pytest.mark.parametrize("name", TABLES)
def test_columns_are_words_of_the_vocabulary(tiny_llama: Model, name: str) -> None:
    frame: pd.DataFrame = TABLES[name](tiny_llama)
    assert len(frame)
    generic = [re.sub(r"^top_\d+(_id|_logprob)?$", "target", column) for column in frame.columns]
    assert not [column for column in generic if column not in COLUMNS and "_logprob" not in column]


def test_results_draw_themselves(tiny_llama: Model) -> None:
    sweep = icl.patch_sweep(tiny_llama, FEW, layers=[1, 2], setup=SETUP)
    assert len(sweep.plot().axes) > 1
    assert len(vectors(tiny_llama).plot().axes) > 1


def test_setups_check_themselves() -> None:
    assert icl.PromptSetup(dummy_inputs=["a", "b"]).dummy_inputs == ("a", "b")
    for wrong, kind in [
        ({"dummy_inputs": "thing"}, TypeError),
        ({"dummy_outputs": ()}, ValueError),
        ({"seed": -1}, ValueError),
    ]:
        with pytest.raises(kind, match=f"{next(iter(wrong))}=.* was given; expected"):
            icl.PromptSetup(**wrong)
