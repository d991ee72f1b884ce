"""A whole study in one line, for the demo: choose on a few prompts, race on a few others."""

import warnings

from spade_lens.exits.calibrate import calibrate
from spade_lens.exits.candidates import ExitWarning
from spade_lens.exits.confidence import AnswerHead
from spade_lens.exits.wallclock import race
from spade_lens.lenses.keep import Keep
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.settings import Settings, scoped
from spade_lens.studies.exits.plan import even_layers
from spade_lens.tasks.word_pairs import WordPairTask

_PROMPTS = 16
_KEEPS = {"query+labels": Keep(spans=("query", "labels")), "last 16": Keep(last=16)}


@scoped
def exit_line(
    model: Model, task: WordPairTask, *, shots: int, seed: int, settings: Settings | None = None
) -> str:
    """What SPADE-EXIT saves on a word-pair task, in seconds, said in a sentence.

    Keep set, check and policy are chosen on the task's calibration pairs, with not a right answer
    lost; the race is run on sixteen test prompts. A first impression:
    :func:`~spade_lens.studies.exit_study` measures it with intervals.

    Args:
        model: The model, a plain Hugging Face one.
        task: The task.
        shots: Demonstrations in every prompt.
        seed: Of the sampling.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If the task has too few pairs, or the model cannot be raced.
    """
    decisions = task.decisions(shots=shots)
    sizes = decisions.split_sizes()
    some = {"calibration": min(40, sizes["calibration"]), "test": min(_PROMPTS, sizes["test"])}
    held_out, others = (
        decisions.prompts(model.tokenizer, n, shots=shots, seed=seed, split=split, fewer=True)
        for split, n in some.items()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)  # few prompts; the sentence says how many
        found = calibrate(
            model,
            held_out,
            keep=_KEEPS,
            checks=[],
            layers=even_layers(model.n_layers),
        )
        rule = found.best(0.0)
        engine = rule.engine()
    trace = engine.run(others)
    [timed] = race([engine], others, rounds=3)
    last = capture(
        model, others, layers=[model.n_layers], positions=[[p.answer] for p in others]
    ).layer(model.n_layers)
    same = int((trace.answer == AnswerHead(model).read(last, others)[1]).sum())
    return (
        f"SPADE-EXIT on {task.name}: {timed.speedup:.2f} times as fast as the plain model by the "
        f"clock ({trace.speedup:.2f} in FLOPs). Of {len(others)} answers among eight options, "
        f"{same} are the full model's (keeps {rule.spade.name}, {rule.policy.name}; chosen on "
        f"{len(held_out)} other prompts)."
    )
