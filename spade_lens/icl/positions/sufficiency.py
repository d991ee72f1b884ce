"""The sufficiency map: which positions, at a layer, are enough for the rest of the network.

SPADE runs the residuals of a few kept positions through the remaining layers. If the full model's
answer comes out, those positions hold by that layer all that the answer needs. Unlike patching,
this writes nothing foreign into the model: it removes all other positions. The sets and
their controls are ours. :mod:`spade_lens.icl.positions.smallest_sets` searches a prompt's smallest
set.

If answers are labels, a kept label may simply be copied: then it suffices, and no rule was
carried. :class:`spade_lens.lenses.keep.ClassLabels` separates the two.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from spade_lens.lenses.keep import ClassLabels, Keep, KeepRule, RandomSet, last_labels, name_of
from spade_lens.lenses.reading import read
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped

_ALL = Keep(last=1_000_000_000, name="all")


def position_sets(prompts: Sequence[Prompt], *, last: Sequence[int] = (1, 2, 4)) -> list[KeepRule]:
    """Return the sets of the map. All hold the start token and the answer token.

    Example:
        >>> labelled = [Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4), "query": (6, 7)})]
        >>> [rule.name for rule in position_sets(labelled, last=(1,))]
        ['answer', 'query', 'labels', 'query+labels', 'last label', 'query+last label', 'all']

    Returns:
        The answer token alone; ``query``, ``inputs``, ``labels``, ``query+inputs``,
        ``query+labels``; ``query+same labels`` and ``query+other labels``, where the labels of
        every prompt are its candidates, both kinds among them (:class:`ClassLabels`); the last
        labels, with and without the query; and all tokens.
    """
    shared = set(prompts[0].spans).intersection(*(p.spans for p in prompts)) if prompts else set()
    wanted = [("query",), ("inputs",), ("labels",), ("query", "inputs"), ("query", "labels")]
    rules: list[KeepRule] = [Keep(name="answer")]
    rules += [Keep(spans=s, name="+".join(s)) for s in wanted if set(s) <= shared]
    if {"query", "labels"} <= shared and all(map(_in_classes, prompts)):
        rules += [ClassLabels(same=True), ClassLabels(same=False)]
    if "labels" in shared:
        most = max(len(p.spans["labels"]) for p in prompts)
        rules += [last_labels(n) for n in last if n < most]
        if "query" in shared:
            rules += [last_labels(n, query=True) for n in last if n < most]
    return [*rules, _ALL]


def _in_classes(prompt: Prompt) -> bool:
    """Return whether the labels are the candidates of the answer, its own and others."""
    labels = {prompt.tokens[p] for p in prompt.spans["labels"]}
    return prompt.target in labels and 1 < len(labels) and labels <= set(prompt.candidates)


@scoped
def sufficiency_map(
    model: Model,
    prompts: PromptsLike,
    *,
    sets: Sequence[KeepRule] | Mapping[str, KeepRule] | None = None,
    layers: LayersLike = None,
    draws: int = 1,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Test which sets of positions suffice at which layer, beside random sets of equal size.

    Example:
        >>> frame = icl.sufficiency_map(model, prompts, layers=[2])
        >>> frame[frame["lens"] == "all"]["agrees"].tolist()
        [True, True]

    Args:
        model: The model.
        prompts: Prompts with spans, such as :func:`spade_lens.prompts.few_shot_prompt` gives.
        sets: The sets, as rules of (prompt, answer position). By default those of the spans: the
            query, the inputs, the labels, the last of them, and what goes together.
        layers: The layers, 0 to ``n_layers``; all by default.
        draws: How many random sets of equal size to draw for each set that is neither the answer
            token alone nor everything. If a set holds the query, as many again are drawn that
            keep the query: without it no set can answer. Ours.
        seed: Seed of the drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The table of a :class:`~spade_lens.Readout`, ready for ``stats.summarise``: one row for
        every set (the column ``lens``), layer and prompt, with ``agrees`` and, where there are
        targets, ``correct``; and beside these ``kept``, the number of tokens, ``of``, the set
        that a row is of or is a control of, and ``control``. The draws of one control share a
        name. With ``draws`` above 1, ``summarise`` averages the draws of a prompt first.

    Raises:
        ValueError: If layers or prompts do not fit the model, a set's spans are missing, two sets
            have one name, or ``draws`` is negative.
    """
    checked = model.prompts(prompts)
    if draws < 0:
        raise ValueError(f"draws={draws} was given; expected 0 or more random sets.")
    if sets is None:
        sets = position_sets(checked)
    if not isinstance(sets, Mapping):
        if not isinstance(sets, Sequence) or not all(map(callable, sets)):
            raise TypeError(
                f"sets={sets!r:.80} was given; expected rules, such as [Keep()], or by name."
            )
        names = [name_of(rule) for rule in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"Two sets have one name: {names}. Give them as a mapping by name.")
        sets = dict(zip(names, sets, strict=True))
    lenses: list[Spade] = []
    about: dict[str, tuple[str, str, bool, list[int]]] = {}
    for name, rule, of, control in _with_controls(sets, checked, draws, seed):
        lenses.append(Spade(model, keep=rule, name=f"{len(lenses)}"))
        kept = [len(set(rule(p, p.answer))) for p in checked]
        about[lenses[-1].name] = (name, of, control, kept)
    frame = read(checked, lenses, layers=layers, top_k=1).to_frame()
    rows = [about[lens] for lens in frame["lens"]]
    frame["lens"] = [name for name, _, _, _ in rows]
    frame["of"] = [of for _, of, _, _ in rows]
    frame["control"] = [control for _, _, control, _ in rows]
    frame["kept"] = [kept[i] for (_, _, _, kept), i in zip(rows, frame["prompt"], strict=True)]
    return frame


def _with_controls(
    sets: Mapping[str, KeepRule], prompts: Sequence[Prompt], draws: int, seed: int
) -> list[tuple[str, KeepRule, str, bool]]:
    """Return sets and controls: name, rule, name of the set it belongs to, whether control."""
    named: list[tuple[str, KeepRule, str, bool]] = []
    for name, rule in sets.items():
        named.append((name, rule, name, False))
        kept = [set(rule(p, p.answer)) for p in prompts]
        if all(len(k) <= 2 or len(k) > p.answer for k, p in zip(kept, prompts, strict=True)):
            continue  # nothing to draw: the answer token alone, or everything
        queries = [set(p.spans.get("query", ())) for p in prompts]
        has_query = all(q and q <= k for q, k in zip(queries, kept, strict=True))
        has_more = any(len(k) > 2 + len(q) for q, k in zip(queries, kept, strict=True))
        for fixed in ["", "query"] if has_query and has_more else [""]:
            control = f"{fixed}+random" if fixed else "random"
            for draw in range(draws):
                random = RandomSet(rule, fixed, draw, seed)
                named.append((f"{control}, as many as {name}", random, name, True))
    return named
