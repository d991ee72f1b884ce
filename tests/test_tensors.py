"""Typed tensor utilities, against loops over prompts and demonstrations."""

import pytest
import torch

from spade_lens.tensors import label_mean_of_others, mean_of_others, stack_by_demonstration


def test_stacking_keeps_prompts_together() -> None:
    slots = torch.randn(3, 8, 5)
    stacked = stack_by_demonstration(slots, 4)
    assert stacked.shape == (3, 2, 4, 5)
    for batch in range(2):
        for demo in range(4):
            assert torch.equal(stacked[:, batch, demo], slots[:, 4 * batch + demo])


def test_slots_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="n_demos=3 was given for 8 slots"):
        stack_by_demonstration(torch.zeros(1, 8, 2), 3)


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 6, 3, 4)])
def test_means_of_others_leave_the_prompt_out(shape: tuple[int, ...]) -> None:
    vectors, groups = torch.randn(shape), "aababb"
    means = mean_of_others(vectors, groups)
    assert means.shape == shape
    for i, group in enumerate(groups):
        others = [j for j, g in enumerate(groups) if g == group and j != i]
        torch.testing.assert_close(means[:, i], vectors[:, others].mean(dim=1))


def test_label_means_of_others_leave_the_prompt_out() -> None:
    vectors, groups = torch.randn(2, 6, 3, 4), "aababb"
    labels = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0], [1, 1, 0]])
    means = label_mean_of_others(vectors, labels, groups)
    for i, group in enumerate(groups):
        for demo in range(3):
            rows = [
                vectors[:, j, k]
                for j, other in enumerate(groups)
                for k in range(3)
                if other == group and j != i and labels[j, k] == labels[i, demo]
            ]
            torch.testing.assert_close(means[:, i, demo], torch.stack(rows).mean(dim=0))
