"""Accuracy by demonstrations, on a tiny model for exactness and on the real one for sense."""

import pandas as pd
import pytest

from spade_lens import Model, icl
from spade_lens.icl import accuracy_by_shots
from spade_lens.lenses.answers import full_answers
from spade_lens.prompts import Template
from spade_lens.stats import summarise
from spade_lens.tasks import RuleTask, WordPairTask, task

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
RULE = RuleTask("t", {"x": ("a", "bb", "ccc", "d", "ee"), "y": ("ff", "g", "hhh", "i", "jj")})
PAIRS = WordPairTask("u", tuple((c, c.upper()) for c in "abcdefgh"))


def test_rows_are_the_answers_of_each_number(tiny_llama: Model) -> None:
    frame = accuracy_by_shots(
        tiny_llama, [RULE, PAIRS], n=4, shots=(3, 0), setup=icl.PromptSetup(TIGHT)
    )
    assert len(frame) == 16
    for own in (RULE, PAIRS):
        for shots in (0, 3):
            episodes = own.episodes(4, shots=shots)
            prompts = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in episodes]
            expected = full_answers(tiny_llama, prompts).to_frame()
            mine = frame[(frame["task"] == own.name) & (frame["shots"] == shots)]
            found = mine[list(expected)].reset_index(drop=True)
            pd.testing.assert_frame_equal(found, expected, atol=1e-4, rtol=0)


def test_nothing_to_do_is_named(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match="No tasks were given"):
        accuracy_by_shots(tiny_llama, [])
    with pytest.raises(ValueError, match=r"shots=\[\] was given"):
        accuracy_by_shots(tiny_llama, [RULE], shots=())


@pytest.mark.download
def test_the_real_model_learns_a_rule_from_demonstrations(smollm2: Model) -> None:
    frame = accuracy_by_shots(smollm2, [task("animal/country")], n=24, shots=(0, 16))
    summary = summarise(frame, by=("task", "shots")).set_index(["shots", "measure"])
    assert summary.loc[(0, "preference"), "mean"] < 0.75
    assert summary.loc[(16, "accuracy"), "mean"] > 0.85
