"""The study in one line, on the real model."""

import re

import pytest

from spade_lens import Model, tasks
from spade_lens.studies import exit_line


@pytest.mark.download
def test_the_line_says_what_was_measured(smollm2: Model) -> None:
    line = exit_line(smollm2, tasks.task("present-past"), shots=4, seed=0)
    found = re.search(r": ([\d.]+) times .*\(([\d.]+) in FLOPs\).* options, (\d+) are", line)
    assert found is not None, line
    assert float(found[1]) > 0
    assert float(found[2]) > 1  # chosen since it saves compute
    assert int(found[3]) >= 12  # not a right answer was lost on other prompts


def test_too_few_pairs(tiny_llama: Model) -> None:
    few = tasks.WordPairTask.from_pairs([["a", "A"], ["b", "B"], ["c", "C"]], name="few")
    with pytest.raises(ValueError, match="few"):
        exit_line(tiny_llama, few, shots=1, seed=0)
