"""Find a task by its name."""

import difflib

from spade_lens.tasks.categories import rule_task, rule_task_names
from spade_lens.tasks.decisions import DecisionTask
from spade_lens.tasks.knowledge import KnowledgeTask
from spade_lens.tasks.named import decision_task, decision_task_names
from spade_lens.tasks.pair_decisions import pair_decisions
from spade_lens.tasks.rules import Task
from spade_lens.tasks.word_pairs import WordPairTask, task, task_names


def exit_task(
    task: str | DecisionTask | WordPairTask, *, shots: int | None = None, split_seed: int = 0
) -> DecisionTask:
    """A task with splits, from a name or from word pairs.

    Example:
        >>> exit_task("antonym").name
        'antonym'

    Args:
        task: A decision task or its name, word pairs or their name.
        shots: Demonstrations in every prompt, which word pairs must have enough of.
        split_seed: Seed of the splitting.

    Raises:
        ValueError: If there is no such task, or too few word pairs.
        DownloadError: If its data could not be had.
    """
    if isinstance(task, DecisionTask):
        return task
    if isinstance(task, WordPairTask) or task in task_names():
        return pair_decisions(task, shots=8 if shots is None else shots, split_seed=split_seed)
    if task not in decision_task_names():
        names = [*decision_task_names(), *task_names()]
        raise ValueError(f"There is no task {task!r}. The tasks are {', '.join(names)}.")
    return decision_task(task, split_seed=split_seed)


def icl_task(name: str | Task | WordPairTask) -> Task:
    """A task of experiments, from a name or from word pairs.

    Example:
        >>> icl_task("animal/country").name, icl_task("antonym").name
        ('animal/country', 'antonym')

    Args:
        name: Two categories with a slash between them, a rule, the name of word pairs, word
            pairs, or a task, which is given back.

    Raises:
        ValueError: If there is no such task; the message offers the nearest names.
    """
    if isinstance(name, WordPairTask):
        return KnowledgeTask(name)
    if not isinstance(name, str):
        return name
    if name in task_names():
        return KnowledgeTask(task(name))
    if "/" in name or name in rule_task_names():
        return rule_task(name)
    known = [*rule_task_names(), *task_names()]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"There is no task {name!r}. {hint}The tasks are {', '.join(known)}, and two categories "
        "with a slash between them, such as 'animal/country'."
    )
