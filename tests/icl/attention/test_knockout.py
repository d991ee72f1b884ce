"""Knockout: exact against blocks called by hand with the edges masked; edges are what they say."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import blocks_of, hidden_states
from tiny import ARCHITECTURES, tiny
from torch import Tensor

from spade_lens import Model, Prompt, Settings, UnsupportedModelError, icl, load, stats
from spade_lens.icl.attention.edges import EDGES, check_edges, random_edges
from spade_lens.icl.attention.knockout import layer_windows, run_cut

# <s> i i > o , i > o , q q >
SPANS = {
    "query": (9, 10),
    "arrow": (11,),
    "inputs": (1, 2, 6),
    "arrows": (3, 7),
    "outputs": (4, 8),
    "labels": (4, 8),
    "demo0/input": (1, 2),
    "demo0/arrow": (3,),
    "demo0/output": (4,),
    "demo1/input": (6,),
    "demo1/arrow": (7,),
    "demo1/output": (8,),
}


def prompts_of(n: int = 3, *, longer: int = 0, candidates: tuple[int, ...] = ()) -> list[Prompt]:
    found = []
    for i in range(n):
        tokens = (1, *((11 * k + 17 * i) % 90 + 5 for k in range(11 + longer * i)))
        found.append(
            Prompt(tokens=tokens, answer=11, target=9 + i, spans=SPANS, candidates=candidates)
        )
    return found


@torch.no_grad()
def blocks_with_mask(
    hf_model: Any, resid: Tensor, cut: Sequence[tuple[int, int]], start: int, stop: int
) -> Tensor:
    """Hugging Face blocks by hand on a whole prompt, with its own mask and the edges masked."""
    config, n = hf_model.config, len(resid)
    base = getattr(hf_model.base_model, "decoder", hf_model.base_model)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    at, hidden = torch.arange(n)[None], resid[None]
    for index in range(start, stop):
        kind = kinds[index] if kinds else None
        sliding = window is not None and kind in (None, "sliding_attention")
        mask = torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min)
        for q in range(n):
            for k in range(q + 1):
                if (q, k) not in cut and (not sliding or q - k < window):
                    mask[0, 0, q, k] = 0
        kwargs: dict[str, Any] = {"attention_mask": mask, "position_ids": at}
        if hasattr(base, "rotary_emb"):
            by_kind = config.model_type == "gemma3_text"
            rotary = base.rotary_emb(hidden, at, kind) if by_kind else base.rotary_emb(hidden, at)
            kwargs["position_embeddings"] = rotary
        out = blocks_of(hf_model)[index](hidden, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_equals_blocks_by_hand(name: str) -> None:
    hf_model = tiny(name)
    model = load(hf_model)
    prompt = prompts_of(1)[0]
    stream = hidden_states(hf_model, prompt.tokens)
    everything = [(11, k) for k in range(11)]  # all edges into the final position
    for edges in (everything, EDGES["input -> own arrow, label"](prompt)):
        cut = torch.zeros(1, 12, 12, dtype=torch.bool)
        for q, k in edges:
            cut[0, q, k] = True
        at = torch.arange(12)[None]
        if name == "opt":  # its attention is hooked after the fact only
            with pytest.raises(UnsupportedModelError, match="read only"):
                run_cut(model, stream[1][None], at, cut, 1, 3)
            continue
        with torch.no_grad():
            ours = run_cut(model, stream[1][None], at, cut, 1, 3)[0]
        expected = blocks_with_mask(hf_model, stream[1], edges, 1, 3)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert (ours - stream[3])[-1].abs().max() > 1e-2


def test_the_table_equals_a_run_by_hand(tiny_llama: Model) -> None:
    hf_model, prompts = tiny(), prompts_of(3, longer=3)  # lengths differ
    windows = [(0, 4), (1, 3)]
    frame = icl.knockout(
        tiny_llama, prompts, windows=windows, draws=1, settings=Settings(batch_size=2)
    )
    assert len(frame) == 3 * (1 + 2 * 2 * 5)
    with torch.no_grad():
        for row in frame.itertuples():
            prompt = prompts[row.prompt]
            edges = [] if row.edges == "nothing" else EDGES[row.edges](prompt)
            if row.control:
                edges = random_edges(prompt, edges)
            assert row.cut == len(edges)
            stream = hidden_states(hf_model, prompt.tokens)[row.start]
            resid = blocks_with_mask(hf_model, stream, edges, row.start, row.stop)
            resid = blocks_with_mask(hf_model, resid, [], row.stop, 4)
            logits = hf_model.lm_head(hf_model.model.norm(resid))[11]
            best_other = max(float(v) for t, v in enumerate(logits) if t != prompt.target)
            difference = float(logits[prompt.target]) - best_other
            assert row.logit_diff == pytest.approx(difference, abs=1e-3)
            assert row.correct == (int(logits.argmax()) == prompt.target)


def test_cutting_nothing_changes_nothing(tiny_llama: Model) -> None:
    frame = icl.knockout(tiny_llama, prompts_of(), edges={"none": lambda p: []})
    assert frame["change"].abs().max() == 0
    assert frame["agrees"].all() and (frame["cut"] == 0).all()
    summary = stats.summarise(frame, ["correct", "agrees"])
    assert list(summary.columns[:4]) == ["edges", "control", "start", "stop"]
    assert len(summary) == 2 * (1 + 2 * 5)


def test_candidates_are_what_is_compared(tiny_llama: Model) -> None:
    nothing = {"none": lambda p: []}
    free = icl.knockout(tiny_llama, prompts_of(1), edges=nothing, windows=[(0, 1)])
    among = icl.knockout(
        tiny_llama, prompts_of(1, candidates=(9, 70)), edges=nothing, windows=[(0, 1)]
    )
    assert among["logit_diff"][0] > free["logit_diff"][0]


def test_edges_by_name() -> None:
    prompt = prompts_of(1)[0]
    assert {name: rule(prompt) for name, rule in EDGES.items()} == {
        "input -> own label": [(4, 1), (4, 2), (8, 6)],
        "input -> own arrow, label": [(3, 1), (3, 2), (4, 1), (4, 2), (7, 6), (8, 6)],
        "label -> later labels": [(8, 4)],
        "label -> final position": [(11, 4), (11, 8)],
        "label -> query, final position": [(9, 4), (9, 8), (10, 4), (10, 8), (11, 4), (11, 8)],
    }


def test_random_edges_are_as_many_and_others() -> None:
    prompt = prompts_of(1)[0]
    for rule in EDGES.values():
        cut = rule(prompt)
        seen = set()
        for draw in range(10):
            drawn = random_edges(prompt, cut, draw=draw)
            seen.add(tuple(drawn))
            assert len(set(drawn)) == len(drawn) == len(cut)
            assert not set(drawn) & set(cut)
            assert all(0 < k < q <= 11 for q, k in drawn)
        assert len(seen) > 1
    final = random_edges(prompt, EDGES["label -> final position"](prompt))
    assert [q for q, _ in final] == [11, 11]
    assert layer_windows(3) == [(0, 3), (0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"windows": [(0, 5)]}, r"Windows \[\(0, 5\)\] were given"),
        ({"windows": [(2, 2)]}, r"Windows \[\(2, 2\)\] were given"),
        ({"windows": []}, "expected pairs"),
        ({"draws": -1}, "draws=-1"),
        ({"edges": ["to the moon"]}, r"edges=\['to the moon'\] was given; expected some of"),
        ({"prompts": [Prompt((1, 2, 3))]}, r"Prompts \[0\] have no target"),
        ({"prompts": [Prompt((1, 2), target=3, candidates=(3,))]}, "no candidate but the target"),
        ({"prompts": [Prompt((1, 2, 3), target=3)]}, "need the span 'labels'"),
        (
            {"edges": {"own": lambda p: [(3, 3)]}},
            r"Edges \[\(3, 3\)\] of 'own' do not fit",
        ),
    ],
)
def test_bad_input_is_refused(tiny_llama: Model, changed: dict[str, Any], message: str) -> None:
    prompts = changed.pop("prompts", prompts_of(1))
    with pytest.raises(ValueError, match=message):
        icl.knockout(tiny_llama, prompts, **changed)


def test_edges_are_checked_against_their_prompt() -> None:
    assert check_edges([(2, 1), (2, 1), (1, 0)], Prompt((1, 2, 3)), 0, "x") == [(1, 0), (2, 1)]
    with pytest.raises(ValueError, match="A token's attention to itself cannot be cut"):
        check_edges([(1, 2)], Prompt((1, 2, 3)), 0, "x")
