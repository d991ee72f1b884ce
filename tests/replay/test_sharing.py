"""Rows that share tokens: equal to whole patched runs, and no token runs twice."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from reference import watch_blocks
from tiny import ARCHITECTURES, tiny
from torch import Tensor

from spade_lens import Model, Patch, Prompt, Residuals, Settings, capture, load
from spade_lens.lenses.answers import read_answers
from spade_lens.replay import capture_for_replay, replay
from spade_lens.replay.prefix_tree import RowPath, Segment, batches, find_segments, whole_rows
from spade_lens.settings import one_call
from spade_lens.tasks import task

LABELS = (3, 6, 9, 12, 15)
DEMONSTRATIONS = tuple(4 + (7 * i) % 90 for i in range(16))
# Two queries after the same demonstrations, and two prompts of other lengths.
PROMPTS = [
    Prompt(tokens=(*DEMONSTRATIONS, 20, 21)),
    Prompt(tokens=(*DEMONSTRATIONS, 30, 21)),
    Prompt(tokens=tuple(5 + (11 * i) % 90 for i in range(23))),
    Prompt(tokens=tuple(6 + (13 * i) % 90 for i in range(17)), answer=16),
]
COALITIONS = list(product([False, True], repeat=len(LABELS)))
UP = (1, 2, 3, 4)

Case = tuple[list[int], list[Patch]]


def vectors(model: Model, n: int, seed: int = 1) -> Tensor:
    return torch.randn(
        n, model.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(model.dtype)


def written(
    model: Model, layers: Sequence[int], positions: Sequence[int] | None, mode: str = "replace"
) -> Case:
    """Two rows of every prompt, with other values each; None is the answer position."""
    rows = [i for i in range(4) for _ in range(2)]
    at = [[PROMPTS[i].answer] if positions is None else positions for i in rows]
    where = [(row, p) for row, some in enumerate(at) for p in some]
    return rows, [
        Patch(
            layer,
            prompts=[row for row, _ in where],
            positions=[[p] for _, p in where],
            values=vectors(model, len(where), seed=layer),
            mode=mode,
        )
        for layer in layers
    ]


def coalitions(model: Model, layers: Sequence[int], prompts: Sequence[int] = (0, 1)) -> Case:
    """All sets of labels; every row brings a copy of its own of the values."""
    values = {layer: vectors(model, len(LABELS), seed=layer) for layer in layers}
    rows = [i for i in prompts for _ in COALITIONS]
    patches = []
    for row, some in enumerate([*COALITIONS] * len(prompts)):
        chosen = [k for k, inside in enumerate(some) if inside]
        at = tuple(LABELS[k] for k in chosen)
        patches += [
            Patch(layer, row, [at], values=values[layer][chosen].clone())
            for layer in layers
            if chosen
        ]
    return rows, patches


def mixed(model: Model) -> Case:
    """Rows that start at other layers, none at all, duplicates, a gap in the layers written."""
    some = vectors(model, 6)
    return [0, 0, 1, 0, 2, 0, 1, 1, 3], [
        Patch(2, (0, 1, 2), 6, values=some[0]),
        Patch(3, (1, 2), 9, values=some[1], mode="add"),
        Patch(1, 2, 12, values=some[2]),
        Patch(1, (4, 5), [[22], [17]], values=some[3:5]),
        Patch(3, (4, 5), [[22], [17]], values=some[3:5]),
        Patch(2, (6, 7), 3, values=some[5]),
        Patch(3, (6, 7), 3, values=some[4]),
        Patch(2, 7, 3, values=some[0], mode="add"),
    ]


CASES: dict[str, Callable[[Model], Case]] = {
    "arrow": lambda model: written(model, [1], None),
    "arrow up": lambda model: written(model, UP, None),
    "arrow at the top": lambda model: written(model, [4], None),
    "last label": lambda model: written(model, [2], LABELS[-1:]),
    "labels": lambda model: written(model, [1], LABELS),
    "labels to the top": lambda model: written(model, UP, LABELS),
    "labels added": lambda model: written(model, [0, 2], LABELS, mode="add"),
    "start": lambda model: written(model, [0, 1, 2, 3], [0]),
    "coalitions": lambda model: coalitions(model, [1]),
    "coalitions up": lambda model: coalitions(model, UP),
    "mixed": mixed,
}


def whole(model: Model, case: Case) -> Tensor:
    rows, patches = case
    prompts = [PROMPTS[i] for i in rows]
    at = [[prompt.answer] for prompt in prompts]
    return capture(model, prompts, layers=[model.n_layers], positions=at, patches=patches).stack[0]


def replayed(model: Model, case: Case, **options: Any) -> Tensor:
    return replay(model, capture_for_replay(model, PROMPTS), *case, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_whole_patched_runs(name: str) -> None:
    model = load(tiny(name))
    one = torch.zeros(1, 1, dtype=torch.long)
    assert model.cached_tokens(one, lambda _: torch.zeros(1, 1, 32)) is not None
    for case in (make(model) for make in CASES.values()):
        expected = whole(model, case)
        scale = float(expected.abs().max().clamp(min=1))
        torch.testing.assert_close(replayed(model, case), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_is_exact_in_double_precision(case: str) -> None:
    # A GPT-2, as Llama's own norms and rotary tables are made in single precision.
    model = load(tiny("gpt2").double())
    rows = CASES[case](model)
    torch.testing.assert_close(replayed(model, rows), whole(model, rows), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", ["labels to the top", "coalitions", "mixed"])
def test_without_keys_and_values_and_with_little_memory_it_is_the_same(
    tiny_llama: Model, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = CASES[case](tiny_llama)
    expected = replayed(tiny_llama, rows)
    for memory in (1e-6, 3e-4):
        little = replayed(tiny_llama, rows, settings=Settings(memory_limit=memory))
        torch.testing.assert_close(little, expected, atol=1e-4, rtol=0)
    with tiny_llama.hooks([]):
        residuals = capture_for_replay(tiny_llama, PROMPTS)
        hooked = replay(tiny_llama, residuals, *rows)
    torch.testing.assert_close(hooked, expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(Model, "cached_tokens", lambda *_: None)
    torch.testing.assert_close(replayed(tiny_llama, rows), expected, atol=1e-4, rtol=0)


# --- what is not run ----------------------------------------------------------------------------


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one segment, which need no padding."""
    monkeypatch.setattr("spade_lens.settings._BATCH_TOKENS", 1)


def tokens_run(monkeypatch: pytest.MonkeyPatch, case: Callable[[Model], Case]) -> list[int]:
    """How many tokens each block has run in a replay."""
    hf_model = tiny("llama")
    model, counts = load(hf_model), [0] * 4

    def count(i: int, hidden: Tensor) -> None:
        counts[i] += hidden.shape[0] * hidden.shape[1]

    # In a call of its own a replay first captures one prompt again.
    with one_call(), monkeypatch.context() as patched:
        residuals, rows = capture_for_replay(model, PROMPTS), case(model)
        watch_blocks(patched, hf_model, count)
        replay(model, residuals, *rows)
    return counts


def test_of_a_patched_arrow_nothing_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens_run(monkeypatch, CASES["arrow"]) == [0, 8, 8, 8]
    assert tokens_run(monkeypatch, CASES["arrow at the top"]) == [0, 0, 0, 0]


@pytest.mark.usefixtures("one_at_a_time")
def test_tokens_given_at_every_layer_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows of each prompt; from the first label on, less five labels.
    after = sum(2 * (prompt.answer + 1 - 3 - 5) for prompt in PROMPTS)
    assert tokens_run(monkeypatch, CASES["labels to the top"]) == [0, after, after, 8]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("upward", [False, True])
def test_coalitions_share_all_that_they_can(upward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    distinct = {
        (p, tuple(inside for at, inside in zip(LABELS, some, strict=True) if at <= p))
        for some in COALITIONS
        if any(some)
        for p in range(LABELS[some.index(True)], 18)
        if not (upward and p in LABELS and some[LABELS.index(p)])
    }
    counts = tokens_run(
        monkeypatch, lambda model: coalitions(model, UP if upward else [1], prompts=(0,))
    )
    assert counts == [0, len(distinct), len(distinct), 31]
    if not upward:
        # 1 + 3 + 7 + 15 + 31 segments of three tokens, from a label to the next or to the end;
        # the plain way is every row from its first patch on.
        assert len(distinct) == 3 * 57
        assert counts[1] < 0.5 * sum(18 - LABELS[c.index(True)] for c in COALITIONS if any(c))


@pytest.mark.usefixtures("one_at_a_time")
def test_queries_share_their_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tokens_run(monkeypatch, lambda model: coalitions(model, [1], prompts=(0,)))
    two = tokens_run(monkeypatch, lambda model: coalitions(model, [1], prompts=(0, 1)))
    # The query's token and the arrow, of 31 coalitions.
    assert two[1] - one[1] == 2 * 31 and two[3] == 2 * 31


# --- the plan -----------------------------------------------------------------------------------

TREE = {
    number: RowPath(tuple(hash(some[: k + 1]) for k in range(5)), tuple(range(5)))
    for number, some in enumerate(COALITIONS)
}


def test_groups_hold_no_more_than_they_may() -> None:
    (all_of_it,) = find_segments(TREE, most_shared=30)
    assert sum(len(s.positions) for s in all_of_it if s.is_shared) == 30
    assert sum(len(s.positions) for s in all_of_it) == 62
    for most in (5, 9, 20):
        groups = find_segments(TREE, most_shared=most)
        assert len(groups) > 1
        for group in groups:
            assert sum(len(s.positions) for s in group if s.is_shared) <= most
        assert sorted(s.row for group in groups for s in group if s.is_end) == list(TREE)


def test_what_has_little_in_common_runs_apart() -> None:
    rows = {n: RowPath((1, 2, 10 * n + 3, 10 * n + 4, 10 * n + 5), (1, 2, 3, 4)) for n in range(9)}
    (group,) = find_segments(rows, most_shared=100)
    assert [s.positions for s in group] == [(1, 2, 3, 4)] * 9
    assert not any(s.is_shared for s in group)


def test_batches_are_of_one_level_and_fit() -> None:
    (group,) = find_segments(TREE, most_shared=30)
    made = list(batches(group, lambda _: 10, most=50, most_tokens=100))
    assert sorted(map(id, group)) == sorted(id(s) for batch in made for s in batch)
    assert max(map(len, made)) == 5
    for batch in made:
        assert len({segment.level for segment in batch}) == 1
    done: set[Segment] = set()
    for batch in made:
        assert all(s.parent is None or s.parent in done for s in batch)
        done |= set(batch)
    assert max(map(len, batches(group, lambda _: 10, most=1e9, most_tokens=7))) == 7


def test_a_batch_costs_what_its_most_expensive_segment_does() -> None:
    # As long as the others, but the first one sees more: all are padded to it.
    seen = [20, *[10] * 8]
    rows = whole_rows({n: RowPath((n,), (0,)) for n in range(len(seen))})
    made = list(batches(rows, lambda s: seen[s.row], most=50, most_tokens=100))
    assert [[s.row for s in batch] for batch in made] == [[0, 1], [2, 3, 4, 5, 6], [7, 8]]


def test_short_rows_are_not_padded_to_long_ones() -> None:
    lengths = [1] * 200 + [40] * 4
    rows = {n: RowPath(tuple(range(k)), tuple(range(k))) for n, k in enumerate(lengths)}
    made = list(batches(whole_rows(rows), lambda _: 1, most=1e9, most_tokens=8192))
    assert [len(batch) for batch in made] == [200, 4]


# --- the real model -----------------------------------------------------------------------------


@pytest.mark.download
def test_real_coalitions_equal_whole_runs(smollm2: Model) -> None:
    episode = task("animal/country").episodes(2, shots=3)[0]
    prompt, other = (
        e.prompt(smollm2.tokenizer) for e in (episode, episode.dummy(("thing",), ("?",)))
    )
    residuals: Residuals = capture_for_replay(smollm2, [prompt, other])
    labels = prompt.spans["labels"]
    patches = []
    for row, some in enumerate(product([False, True], repeat=3)):
        demos = [d for d, inside in enumerate(some) if inside]
        taken = residuals.slots(1, [other.spans["labels"][d] for d in demos])
        patches += [
            Patch(layer, row, [labels[d] for d in demos], values=values[taken])
            for layer in range(20, 31)
            for values in [residuals.layer(layer)]
            if demos
        ]
    found = replay(smollm2, residuals, [0] * 8, patches)
    expected = capture(
        smollm2, [prompt] * 8, layers=[30], positions=[[prompt.answer]] * 8, patches=patches
    ).stack[0]
    differences = [read_answers(smollm2, x, [prompt] * 8).logit_diff for x in (found, expected)]
    torch.testing.assert_close(*differences, atol=1e-4, rtol=0)
