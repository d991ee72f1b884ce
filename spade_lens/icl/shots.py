"""How many demonstrations a task takes: the model's own answers by their number."""

from collections.abc import Sequence

import pandas as pd

from spade_lens.lenses.answers import full_answers
from spade_lens.models.model import Model
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.tasks.episodes import Task, draw_episodes


@scoped
def accuracy_by_shots(
    model: Model,
    tasks: Sequence[Task],
    *,
    n: int = 48,
    shots: Sequence[int] = (0, 1, 2, 4, 8, 16),
    template: Template = ARROW,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """The model's answers to the same queries after ever more demonstrations.

    Every prompt's demonstrations with few shots are the first of those with many.

    Example:
        >>> tasks = [task("animal/country"), task("antonym")]
        >>> frame = accuracy_by_shots(model, tasks)  # doctest: +SKIP
        >>> stats.summarise(frame, by=("task", "shots"))  # doctest: +SKIP

    Args:
        model: The model.
        tasks: Tasks with episodes: word pairs, rules, or your own.
        n: How many prompts of each.
        shots: Numbers of demonstrations.
        template: How a line is written.
        seed: Seed of the drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row per task, number and prompt: ``task``, ``shots``, ``prompt``, ``correct``,
        ``prefers`` and ``logit_diff`` (see :class:`spade_lens.lenses.Answers`).

    Raises:
        ValueError: If there are no tasks or numbers, a task has too few inputs, or its prompts do
            not fit the model.
    """
    if not tasks or not shots:
        raise ValueError(f"{len(tasks)} tasks and shots={tuple(shots)} were given; give some.")
    drawn = [draw_episodes(task, n, shots=max(shots), seed=seed) for task in tasks]
    prompts = {
        (t, k): [
            episode.first(k).prompt(model.tokenizer, template=template) for episode in drawn[t]
        ]
        for t in range(len(tasks))
        for k in sorted(set(shots))
    }
    for some in prompts.values():
        model.check_prompts(some)
    frames = []
    for (t, k), some in progress_bar(prompts.items(), desc="shots"):
        answers = full_answers(model, some).to_frame()
        about = {"task": tasks[t].name, "shots": k, "prompt": range(n)}
        frames.append(pd.DataFrame(about).join(answers))
    return pd.concat(frames, ignore_index=True)
