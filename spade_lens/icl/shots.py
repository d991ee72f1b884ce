"""How many demonstrations a task takes: the model's own answers by their number."""

from collections.abc import Iterable

import pandas as pd

from spade_lens.checks import as_several, whole_numbers
from spade_lens.icl.setup import PromptSetup
from spade_lens.lenses.answers import full_answers
from spade_lens.models.model import Model
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.tasks.episodes import Task, draw_episodes


@scoped
def accuracy_by_shots(
    model: Model,
    tasks: Task | Iterable[Task],
    *,
    n: int = 48,
    shots: int | Iterable[int] = (0, 1, 2, 4, 8, 16),
    setup: PromptSetup | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Measure the model's answers to the same queries after more and more demonstrations.

    Every prompt's demonstrations with few shots are the first of those with many.

    Example:
        >>> frame = accuracy_by_shots(model, task("animal/country"))  # doctest: +SKIP
        >>> stats.summarise(frame)  # doctest: +SKIP

    Args:
        model: The model.
        tasks: A task with episodes, or several: word pairs, rules, or your own.
        n: How many prompts of each.
        shots: Numbers of demonstrations.
        setup: How prompts are written; its seed draws the episodes.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row per task, number and prompt: ``task``, ``shots``, ``prompt``, ``correct``,
        ``prefers``, ``logit_diff`` and ``ambiguous`` (see
        :class:`spade_lens.lenses.answers.Answers`).

    Raises:
        TypeError: If a number of demonstrations is no whole number.
        ValueError: If there are no tasks or numbers, a task has too few inputs, or its prompts do
            not fit the model.
    """
    setup = setup or PromptSetup()
    tasks = [tasks] if isinstance(tasks, Task) else as_several(tasks) or []
    numbers = whole_numbers(
        shots, "shots=", "a number of demonstrations or several, such as (0, 1, 4)"
    )
    if not tasks:
        raise ValueError("No tasks were given; give at least one.")
    prompts = {}
    for t, task in enumerate(tasks):
        episodes = draw_episodes(task, n, shots=max(numbers), seed=setup.seed)
        for k in numbers:
            prompts[t, k] = setup.prompts(model, [episode.first(k) for episode in episodes])
    frames = []
    for (t, k), written in progress_bar(prompts.items(), desc="shots", model=model):
        about = {"task": tasks[t].name, "shots": k, "prompt": range(n)}
        frames.append(pd.DataFrame(about).join(full_answers(model, written).to_frame()))
    return pd.concat(frames, ignore_index=True)
