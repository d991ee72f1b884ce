"""Linear probes: what a hyperplane separates in rule vectors, layer by layer.

A logistic regression on standardised vectors is fitted on some prompts and tested on others, so
that what is special to a prompt does not help. If the class of the input is probed, words must be
split as well. The same words stand in many prompts, and a probe that memorises them would look as
if it had found their class. The control is the same probe on shuffled classes. This module knows
tensors and scikit-learn, and does not run a model.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

from spade_lens.checks import check_number
from spade_lens.icl.geometry.convergence import check_shape
from spade_lens.icl.vectors import VectorsLike, as_rule_vectors
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.stats.intervals import clustered_interval

_Split = tuple[np.ndarray, np.ndarray]
"""Rows to fit and rows to test."""


@scoped
def probe(
    vectors: VectorsLike,
    classes: Int[Tensor, " batch"] | Int[Tensor, "batch demo"],
    *,
    groups: Int[Tensor, " batch"] | None = None,
    words: Int[Tensor, "batch demo"] | None = None,
    folds: int = 5,
    shuffles: int = 1,
    strength: float = 1.0,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Measure how well a linear probe predicts the class of a rule vector, by layer.

    A probe that fails is no evidence that a rule is not used. In one network whose answers are
    known in closed form a linear probe hardly read the rule (error .64 of the variance), and
    patching found it (slope 1.00); see ``docs/in-context.md``.

    Example:
        >>> import torch
        >>> vectors = torch.randn(2, 10, 4, 8)  # [layer batch demo d_model]
        >>> label = (vectors[1, ..., 0] > 0).long()
        >>> frame = icl.probe(vectors, label)
        >>> frame[["layer", "control"]].values.tolist()
        [[0, False], [0, True], [1, False], [1, True]]

    Args:
        vectors: The rule vectors.
        classes: What to predict, as any integers: one for each prompt (its rule) or one for each
            demonstration (its label, the category of its input).
        groups: Prompts of one group are never split between fitting and testing; by default each
            prompt is a group.
        words: The input of every demonstration, as any integers. If they are given, no prompt and
            no word is on both sides: a probe is tested on the words of one part in the prompts of
            one part, and fitted on all other words in all other prompts. Give them for classes of
            the words, such as their category; leave them out for rule and label. Ours.
        folds: Into how many parts the groups are split; each is tested once. Words are split
            too, so that there are ``folds`` squared fits.
        shuffles: How often classes are shuffled for the control: among words, if they are given
            and each has one class; among prompts, if all vectors of a prompt have one class; else
            within each prompt. 0 leaves it out.
        strength: scikit-learn's ``C``; a smaller one keeps the weights closer to 0.
        seed: Seed of the shuffles.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every layer, and one for its control: ``layer, control, mean`` (the accuracy
        over all vectors, each tested once per shuffle), ``low``, ``high`` (of the 95% interval
        over groups, or over words if they are given), ``chance`` (the fraction of the most
        frequent class) and ``n``, the number of groups or words.

    Raises:
        TypeError: If ``vectors`` is neither rule vectors nor a tensor.
        ValueError: If shapes do not fit together, there are fewer than two classes or fewer
            groups or words than folds, or a class would be missing where a probe is fitted.
    """
    check_number("shuffles", shuffles, least=0)
    if not strength > 0:
        raise ValueError(f"strength={strength} was given; expected a number above 0.")
    vectors = as_rule_vectors(vectors)
    n_layers, n_prompts, n_demos, _ = vectors.shape
    expected = (n_prompts,) if classes.ndim == 1 else (n_prompts, n_demos)
    check_shape("classes", classes, expected)
    check_shape("groups", groups, (n_prompts,))
    check_shape("words", words, (n_prompts, n_demos))
    of_prompt = np.arange(n_prompts) if groups is None else groups.cpu().numpy()
    group = np.repeat(of_prompt, n_demos)
    of_word = None if words is None else words.cpu().numpy()
    if classes.ndim == 1:
        classes = repeat(classes, "batch -> batch demo", demo=n_demos)
    table = classes.cpu().numpy()
    rng = np.random.default_rng(seed)
    targets = [table, *(_shuffle(table, of_word, rng) for _ in range(shuffles))]
    splits = _splits(group, folds, "groups of prompts")
    if of_word is not None:
        group = of_word.ravel()
        splits = _crossed(splits, _splits(group, folds, "different words"))
    _check_classes(table, splits)
    _, number = np.unique(group, return_inverse=True)
    n_groups = int(number.max()) + 1
    trials = np.bincount(number).astype(float)
    rows = []
    n_fits = n_layers * len(targets) * len(splits)
    with progress_bar(total=n_fits, desc="probe", unit="fit") as bar:
        for layer, at_layer in zip(vectors.layers, vectors.tensor, strict=True):
            x = rearrange(at_layer, "batch demo d -> (batch demo) d").cpu().double().numpy()
            hits = []
            for target in targets:
                hits.append(_hits(x, target.ravel(), splits, strength))
                bar.update(len(splits))
            for control, of_targets in [(False, hits[:1]), (True, hits[1:])]:
                if not of_targets:
                    continue
                hit = np.mean(of_targets, axis=0)
                right = np.bincount(number, weights=hit).astype(float)
                low, high = clustered_interval(right, trials, hit.size)
                rows.append(
                    {
                        "layer": layer,
                        "control": control,
                        "mean": float(hit.mean()),
                        "low": low,
                        "high": high,
                        "chance": float(np.unique(table, return_counts=True)[1].max() / table.size),
                        "n": n_groups,
                    }
                )
    return pd.DataFrame(rows)


def _hits(x: np.ndarray, y: np.ndarray, splits: Sequence[_Split], strength: float) -> np.ndarray:
    """Return whether each row's class is predicted by the probe that was fitted without it."""
    # Here, so that importing the library does not wait for scikit-learn.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    hit = np.zeros(len(x))
    for train, test in splits:
        if len(set(y[train])) == 1:  # shuffled classes of few prompts
            hit[test] = y[test] == y[train[0]]
            continue
        # Newton takes few steps where others take thousands; but each costs features cubed.
        solver = "newton-cholesky" if x.shape[1] < len(train) else "lbfgs"
        regression = LogisticRegression(C=strength, solver=solver, max_iter=5000)
        fitted = make_pipeline(StandardScaler(), regression).fit(x[train], y[train])
        hit[test] = fitted.predict(x[test]) == y[test]
    return hit


def _shuffle(table: np.ndarray, of_word: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Permute classes, such that vectors of a prompt or word do not tell their new class."""
    if of_word is not None:
        _, first, word = np.unique(of_word, return_index=True, return_inverse=True)
        word = word.reshape(table.shape)
        of_class = table.ravel()[first]
        if (of_class[word] == table).all():
            return rng.permutation(of_class)[word]
    if (table == table[:, :1]).all():
        return table[rng.permutation(len(table))]
    return rng.permuted(table, axis=1)


def _splits(group: np.ndarray, folds: int, what: str) -> list[_Split]:
    n_groups = len(np.unique(group))
    if not 2 <= folds <= n_groups:
        raise ValueError(
            f"folds={folds} was given; expected 2 to {n_groups}, the number of {what}."
        )
    from sklearn.model_selection import GroupKFold

    return list(GroupKFold(folds).split(group, groups=group))


def _crossed(prompts: Sequence[_Split], words: Sequence[_Split]) -> list[_Split]:
    """Return splits that test what both test, and fit what both fit."""
    pairs = [
        (np.intersect1d(train, other_train), np.intersect1d(test, other_test))
        for train, test in prompts
        for other_train, other_test in words
    ]
    return [(train, test) for train, test in pairs if len(test)]


def _check_classes(table: np.ndarray, splits: Sequence[_Split]) -> None:
    every = set(np.unique(table).tolist())
    if len(every) < 2:
        raise ValueError(f"All classes are {every}; a probe needs at least two.")
    for train, _ in splits:
        missing = every - set(np.unique(table.ravel()[train]).tolist())
        if missing:
            raise ValueError(
                f"Classes {sorted(missing)} are of so few prompts or words that a probe would be "
                "fitted without them. Give more of each class, or more folds."
            )
