"""Layers come back in the order given; what is no number of a prompt or layer is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import spanned_prompts

import spade_lens as sl
from spade_lens import icl
from spade_lens.models import Model
from spade_lens.tasks import RuleTask

TIGHT = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = icl.PromptSetup(template=TIGHT, dummy_inputs=("z",), dummy_outputs=("?",))
EPISODES = RuleTask("x/y", {"x": tuple("abcdefghi"), "y": tuple("nopqrstuv")}).episodes(4, shots=4)
PROMPTS = spanned_prompts(3)


def frame_of(result: Any) -> pd.DataFrame:
    return result if isinstance(result, pd.DataFrame) else result.to_frame()


FRAMES: dict[str, Callable[[Model, Any], Any]] = {
    "capture": lambda model, at: sl.capture(model, PROMPTS, layers=at),
    "read": lambda model, at: sl.read(PROMPTS, ["logit", "spade"], model=model, layers=at),
    "rule_vectors": lambda model, at: icl.rule_vectors(model, EPISODES, layers=at, setup=SETUP),
    "contributions": lambda model, at: icl.measure_contributions(
        model, EPISODES[:2], layers=at, setup=SETUP
    ),
    "function vectors": lambda model, at: icl.function_vector_sweep(
        model, EPISODES, heads=[(1, 0)], layers=at, setup=SETUP
    ),
    "smallest sets": lambda model, at: icl.smallest_sets(model, PROMPTS, layers=at, draws=1),
    "head effects": lambda model, at: icl.head_effects(
        model, EPISODES, n=2, blocks=at, setup=SETUP
    ),
}


@pytest.mark.filterwarnings("ignore:On task")
@pytest.mark.parametrize("name", FRAMES)
def test_results_come_in_the_order_asked_for(tiny_llama: Model, name: str) -> None:
    call = FRAMES[name]
    column = "block" if name == "head effects" else "layer"
    both = frame_of(call(tiny_llama, [3, 1]))
    at = both[both[column] >= 0][column]
    assert list(dict.fromkeys(at)) == [3, 1]
    for one in (3, 1):
        alone = frame_of(call(tiny_llama, (n for n in [one])))
        of_both = both[both[column] == one].reset_index(drop=True)
        alone = alone[alone[column] == one].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_both, alone, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"\[1\] twice; give each once"):
        call(tiny_llama, [1, 1])


def test_tensors_come_in_the_order_asked_for(tiny_llama: Model) -> None:
    whole = icl.final_position_vectors(tiny_llama, PROMPTS)
    both = icl.final_position_vectors(tiny_llama, PROMPTS, layers=np.array([4, 0, 2]))
    torch.testing.assert_close(both, whole[[4, 0, 2]])
    vectors = icl.rule_vectors(tiny_llama, EPISODES, setup=SETUP)
    assert torch.equal(vectors.at(x for x in (2, 0)).tensor, vectors.tensor[[2, 0]])


def test_where_prompts_climb_layers_must_rise(tiny_llama: Model) -> None:
    for call in (
        lambda: sl.exits.exit_tables(tiny_llama, PROMPTS, "logit", layers=[3, 1]),
        lambda: sl.fit("l-spade", tiny_llama, n_pieces=20, n_tokens=16, layers=[2, 1]),
        lambda: sl.studies.ExitPlan("sst2", layers=[3, 1]).check_layers(4),
    ):
        with pytest.raises(ValueError, match="ascending"):
            call()


def test_results_are_compared_without_an_error(tiny_llama: Model) -> None:
    one, other = (sl.read(PROMPTS, "logit", model=tiny_llama) for _ in range(2))
    assert one == one and one != other
    residuals = [sl.capture(tiny_llama, PROMPTS) for _ in range(2)]
    assert residuals[0] == residuals[0] and residuals[0] != residuals[1]
    patches = [sl.Patch(1, values=torch.zeros(32)) for _ in range(2)]
    assert patches[0] == patches[0] and patches[0] != patches[1]


def test_figures_do_not_depend_on_the_order_of_layers(tiny_llama: Model) -> None:
    def lines(layers: list[int]) -> list[Any]:
        readout = sl.read(PROMPTS, ["logit", "spade"], model=tiny_llama, layers=layers)
        [axes] = sl.plots.plot_by_layer(readout, "agreement").axes
        return [line.get_xydata().tolist() for line in axes.lines]

    assert lines([4, 1, 2]) == lines([1, 2, 4])
