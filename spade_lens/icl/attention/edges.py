"""Edges of attention in a few-shot prompt: which token attends to which.

The families are the steps of the claim that each demonstration's rule goes from its input to its
own label, and from the labels to the final position. The control has as many other edges. All are
ours. An output of several tokens counts as a label with all of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from spade_lens.prompts.prompt import Prompt

Edge = tuple[int, int]
"""The position of the attention's query and that of its key, which comes before it."""

EdgeRule = Callable[[Prompt], Iterable[Edge]]
"""From a prompt to the edges that are cut."""


def edges_between(prompt: Prompt, sources: Iterable[int], sinks: Iterable[int]) -> list[Edge]:
    """Return all edges by which tokens at ``sinks`` attend to earlier tokens at ``sources``.

    Example:
        >>> edges_between(Prompt(tokens=(1, 5, 6, 7)), sources=(1, 2), sinks=(2, 3))
        [(2, 1), (3, 1), (3, 2)]
    """
    return sorted({(q, k) for q in sinks for k in sources if k < q})


def input_to_own_label(prompt: Prompt) -> list[Edge]:
    """Return edges from each demonstration's input to its own output."""
    return _of_demos(prompt, ("output",))


def input_to_own_arrow_and_label(prompt: Prompt) -> list[Edge]:
    """Return these, and those to its arrow, through which the input could reach the output."""
    return _of_demos(prompt, ("arrow", "output"))


def label_to_later_labels(prompt: Prompt) -> list[Edge]:
    """Return edges from each demonstration's output to the outputs of later ones."""
    outputs = [_span(prompt, f"demo{i}/output") for i in range(_n_demos(prompt))]
    return sorted(
        {
            edge
            for i, output in enumerate(outputs)
            for later in outputs[i + 1 :]
            for edge in edges_between(prompt, output, later)
        }
    )


def label_to_final_position(prompt: Prompt) -> list[Edge]:
    """Return edges from all outputs to the query's arrow; its last token is the final position."""
    return edges_between(prompt, _span(prompt, "outputs"), _span(prompt, "arrow"))


def label_to_query_and_final_position(prompt: Prompt) -> list[Edge]:
    """Return these, and those to the query, through which the outputs could reach the arrow."""
    sinks = (*_span(prompt, "query"), *_span(prompt, "arrow"))
    return edges_between(prompt, _span(prompt, "outputs"), sinks)


EDGES: Mapping[str, EdgeRule] = {
    "input -> own label": input_to_own_label,
    "input -> own arrow, label": input_to_own_arrow_and_label,
    "label -> later labels": label_to_later_labels,
    "label -> final position": label_to_final_position,
    "label -> query, final position": label_to_query_and_final_position,
}
"""The families of edges, in the order in which information would pass."""


def random_edges(
    prompt: Prompt, cut: Sequence[Edge], *, seed: int = 0, draw: int = 0
) -> list[Edge]:
    """Return as many other edges, as far as there are: the control of a cut.

    Args:
        prompt: The prompt.
        cut: The edges that are excluded.
        seed: Seed of the drawing.
        draw: Which of several draws.
    """
    rng = np.random.default_rng([seed, draw, len(cut), *prompt.tokens])
    excluded = set(cut)
    chosen: list[Edge] = []
    for q in sorted({q for q, _ in cut}):
        free = [(q, k) for k in range(1, q) if (q, k) not in excluded]
        wanted = sum(1 for other, _ in cut if other == q)
        chosen += [free[int(i)] for i in rng.permutation(len(free))[:wanted]]
    excluded |= set(chosen)
    left = [(q, k) for q in range(prompt.answer + 1) for k in range(1, q) if (q, k) not in excluded]
    missing = len(cut) - len(chosen)
    chosen += [left[int(i)] for i in rng.permutation(len(left))[:missing]]
    return sorted(chosen)


def check_edges(edges: Iterable[Edge], prompt: Prompt, index: int, name: str) -> list[Edge]:
    """Return the edges of one prompt, in order, each once.

    Raises:
        ValueError: If one does not lead from a token to an earlier one of the prompt.
    """
    unique = sorted(set(edges))
    wrong = [(q, k) for q, k in unique if not 0 <= k < q < len(prompt)]
    if wrong:
        raise ValueError(
            f"Edges {wrong[:3]} of {name!r} do not fit prompt {index}: expected pairs of a "
            f"position and an earlier one, up to {len(prompt) - 1}. A token's attention to itself "
            "cannot be cut."
        )
    return unique


def edge_rules(edges: Mapping[str, EdgeRule] | Sequence[str] | None) -> Mapping[str, EdgeRule]:
    """Return families of edges by name, of what :func:`spade_lens.icl.knockout` is given.

    Raises:
        ValueError: If there is no family of such a name, or none at all.
    """
    if edges is None or isinstance(edges, Mapping):
        return EDGES if edges is None else edges
    names = [edges] if isinstance(edges, str) else list(edges)
    unknown = [name for name in names if name not in EDGES]
    if unknown or not names:
        raise ValueError(f"edges={names} was given; expected some of {list(EDGES)}.")
    return {name: EDGES[name] for name in names}


def _of_demos(prompt: Prompt, sinks: Sequence[str]) -> list[Edge]:
    return sorted(
        edge
        for i in range(_n_demos(prompt))
        for sink in sinks
        for edge in edges_between(
            prompt, _span(prompt, f"demo{i}/input"), _span(prompt, f"demo{i}/{sink}")
        )
    )


def _n_demos(prompt: Prompt) -> int:
    return len(_span(prompt, "labels"))


def _span(prompt: Prompt, name: str) -> tuple[int, ...]:
    if name not in prompt.spans:
        raise ValueError(
            f"The edges need the span {name!r}, as few_shot_prompt gives it; this prompt has "
            f"{sorted(prompt.spans)}."
        )
    return prompt.spans[name]
