"""Where the rule lives, on the real model: few prompts, effects too large to be luck."""

import pytest

from spade_lens import Model, Prompt, icl, tasks

pytestmark = pytest.mark.download


@pytest.fixture(scope="module")
def prompts(smollm2: Model) -> list[Prompt]:
    return tasks.task("present-past").prompts(smollm2.tokenizer, 6, shots=8, seed=0)


def test_query_and_labels_suffice_at_layer_18(smollm2: Model, prompts: list[Prompt]) -> None:
    frame = icl.sufficiency_map(smollm2, prompts, layers=[18])
    agreement = frame.groupby("lens")["agrees"].mean()
    assert agreement["query+labels"] > 0.8
    assert agreement["all"] == 1
    for less in ("answer", "labels", "random, as many as query+labels"):
        assert agreement[less] < 0.4


def test_a_few_tokens_suffice_at_layer_18(smollm2: Model, prompts: list[Prompt]) -> None:
    frame = icl.smallest_sets(smollm2, prompts, layers=[18], draws=2)
    assert frame["sufficient"].all()
    assert frame["units"].median() <= 4 and frame["random"].mean() < 0.4


def test_the_final_position_reads_the_labels_in_the_middle(
    smollm2: Model, prompts: list[Prompt]
) -> None:
    final = ["label -> final position"]
    frame = icl.knockout(smollm2, prompts, edges=final, windows=[(0, 8), (15, 22)])
    change = frame.groupby(["control", "start"])["change"].mean()
    assert change[False, 15] < -3
    assert abs(change[True, 15]) < 1.5 and abs(change[False, 0] - change[True, 0]) < 1.5


def test_saliency_flows_from_labels_to_the_end(smollm2: Model, prompts: list[Prompt]) -> None:
    frame = icl.saliency_flows(smollm2, prompts[:3], start=False)
    late = frame[(frame["block"] >= 15) & (frame["block"] < 21) & ~frame["control"]]
    means = late.groupby("flow")["saliency"].mean()
    assert means["label -> final"] > 4 * means["rest"]
