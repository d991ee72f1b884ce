"""Setups check themselves, and results draw themselves."""

import pytest

from spade_lens import Model, icl
from spade_lens.prompts import Template
from spade_lens.tasks import RuleTask

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = icl.PromptSetup(TIGHT, ("z",))
EPISODES = RuleTask("t", {"x": tuple("abcdefg"), "y": tuple("hijklmn")}).episodes(4, shots=4)


@pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")
def test_results_draw_themselves(tiny_llama: Model) -> None:
    sweep = icl.patch_sweep(tiny_llama, EPISODES, layers=[1, 2], setup=SETUP)
    assert len(sweep.plot().axes) > 1
    vectors = icl.rule_vectors(tiny_llama, EPISODES, layers=[1, 2], setup=SETUP)
    assert len(vectors.plot().axes) > 1


def test_setups_check_themselves() -> None:
    assert icl.PromptSetup(dummy_inputs=["a", "b"]).dummy_inputs == ("a", "b")
    for wrong, kind in [
        ({"dummy_inputs": "thing"}, TypeError),
        ({"dummy_outputs": ()}, ValueError),
        ({"seed": -1}, ValueError),
    ]:
        with pytest.raises(kind, match=f"{next(iter(wrong))}=.* was given; expected"):
            icl.PromptSetup(**wrong)
