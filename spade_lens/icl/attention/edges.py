"""Edges of attention in a few-shot prompt: which token attends to which.

The claim is that each demonstration's rule goes from its input to its own label, and from the
labels to the final position. Each step is a family of edges, with as many others as the control.
All are ours. An output of several tokens counts as a label with all of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from spade_lens.prompts.prompt import Prompt

Edge = tuple[int, int]
"""The position of the attention's query and that of its key, which comes before it."""

EdgeRule = Callable[[Prompt], Iterable[Edge]]
"""From a prompt to the edges that are cut."""


def between_spans(prompt: Prompt, spans: Iterable[tuple[str, str]]) -> list[Edge]:
    """Return all edges by which tokens of each span's second attend to earlier ones of its first.

    Example:
        >>> prompt = Prompt(tokens=(1, 5, 6, 7), spans={"inputs": (1, 2), "labels": (2, 3)})
        >>> between_spans(prompt, [("inputs", "labels")])
        [(2, 1), (3, 1), (3, 2)]
    """
    pairs = [(_span(prompt, sources), _span(prompt, sinks)) for sources, sinks in spans]
    return sorted({(q, k) for sources, sinks in pairs for q in sinks for k in sources if k < q})


def _demos(prompt: Prompt) -> range:
    return range(len(_span(prompt, "labels")))


EDGES: Mapping[str, EdgeRule] = {
    "input -> own label": lambda prompt: between_spans(
        prompt, [(f"demo{i}/input", f"demo{i}/output") for i in _demos(prompt)]
    ),
    # Through its arrow, too, the input could reach the output.
    "input -> own arrow, label": lambda prompt: between_spans(
        prompt,
        [(f"demo{i}/input", f"demo{i}/{to}") for i in _demos(prompt) for to in ("arrow", "output")],
    ),
    "label -> later labels": lambda prompt: between_spans(
        prompt, [(f"demo{i}/output", f"demo{j}/output") for j in _demos(prompt) for i in range(j)]
    ),
    # The last token of the query's arrow is the final position.
    "label -> final position": lambda prompt: between_spans(prompt, [("outputs", "arrow")]),
    # Through the query, too, the outputs could reach the final position.
    "label -> query, final position": lambda prompt: between_spans(
        prompt, [("outputs", "query"), ("outputs", "arrow")]
    ),
}
"""The families of edges, in the order in which information would pass."""


def random_edges(
    prompt: Prompt, cut: Sequence[Edge], *, seed: int = 0, draw: int = 0
) -> list[Edge]:
    """Return as many other edges, as far as there are: the control of a cut."""
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
    """Return the edges of one prompt, in order, each once; refuse those that do not fit it."""
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
    """Return families of edges by name, of what :func:`spade_lens.icl.knockout` is given."""
    if edges is None or isinstance(edges, Mapping):
        return EDGES if edges is None else edges
    names = [edges] if isinstance(edges, str) else list(edges)
    unknown = [name for name in names if name not in EDGES]
    if unknown or not names:
        raise ValueError(f"edges={names} was given; expected some of {list(EDGES)}.")
    return {name: EDGES[name] for name in names}


def _span(prompt: Prompt, name: str) -> tuple[int, ...]:
    if name not in prompt.spans:
        raise ValueError(
            f"The edges need the span {name!r}, as few_shot_prompt gives it; this prompt has "
            f"{sorted(prompt.spans)}."
        )
    return prompt.spans[name]
