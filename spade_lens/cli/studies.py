"""The commands that run a study: ``demo``, ``exit``, ``icl``, ``speculate`` and ``in-context``.

Parameters have the names of the fields of the plan, which is built of them; see ``run_plan``.
"""

from pathlib import Path

from spade_lens.cli import options as opt
from spade_lens.cli.options import (
    DType,
    interruptible,
    option,
    parse_layers,
    plain_errors,
    run_plan,
)


def demo(
    model: str = opt.MODEL,
    tasks: list[str] | None = option(None, "A task; repeat for several. By default all.", "--task"),
    pairs: Path | None = opt.PAIRS,
    shots: int = option(8, opt.SHOTS),
    samples: int = option(40, "Prompts of every task."),
    layers: str | None = opt.LAYERS,
    seed: int = option(0, "Seed of the sampling of prompts."),
    out: Path = option("spade-lens-demo", opt.OUT),
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    fresh: bool = option(False, "Read finished tasks again.", "--fresh"),
    debug: bool = opt.DEBUG,
) -> None:
    """Read several tasks at every layer with the logit lens, SPADE and its ablation.

    Prints a table and writes figures, CSVs and a JSON. After an interruption the same command
    resumes.
    """
    params = locals()
    with plain_errors(debug):
        from spade_lens.studies.lenses import LensPlan

        run_plan(LensPlan, params)


def exit_(
    task: str | None = option(None, "A decision or word-pair task; see `tasks`. By default sst2."),
    model: str = opt.MODEL,
    pairs: Path | None = opt.PAIRS,
    checks: list[str] = option(
        ["l-spade"],
        "What is checked: l-spade (fitted where there is none yet), tuned, logit, or the folder of "
        "a fitted lens; repeat for several.",
        "--lens",
    ),
    keep: list[str] = option(["auto"], "A keep set, such as 'start+answer'; repeat. auto: all."),
    losses: list[float] | None = option(
        None, "A loss of accuracy allowed; repeat. By default best accuracy and 0.01.", "--loss"
    ),
    shots: int | None = option(None, f"{opt.SHOTS} By default the task's own."),
    calibration: int = option(150, "Prompts that everything is chosen on."),
    samples: int = option(200, "Other prompts, to measure on."),
    layers: str | None = option(None, "Candidate layers, such as 12,18,24. By default eight."),
    guarantee: float | None = option(None, "A loss to be guaranteed for new prompts."),
    risk: float = option(0.05, "The chance that the guarantee fails."),
    timed: int = option(32, "Prompts of the wall-clock comparison."),
    rounds: int = option(9, "Rounds of the wall-clock comparison; 0 measures no time."),
    max_tokens: int | None = option(None, "Longer prompts are left out."),
    seed: int = option(0, "Seed of the sampling."),
    out: Path = option("spade-lens-exit", opt.OUT),
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    debug: bool = opt.DEBUG,
) -> None:
    """Choose how to exit early on some prompts, measure it on others, and time it.

    Prints a table and writes figures, CSVs and a JSON. After an interruption the same command
    resumes.
    """
    params = locals()
    with plain_errors(debug):
        if task is not None and pairs is not None:
            raise ValueError("--task and --pairs were both given; a study is of one task.")
        from spade_lens.studies.exits.plan import ExitPlan

        run_plan(ExitPlan, params, task=pairs or task or "sst2")


def icl(
    task: str = option("animal/country", "Two categories, a rule, or word pairs; see `tasks`."),
    model: str = opt.MODEL,
    experiments: list[str] = option(
        ["patching"],
        "shots, patching, contributions, heads, knockout, saliency, geometry, sufficiency or "
        "reading; repeat for several; 'all' for all.",
        "--experiment",
    ),
    classes: Path | None = option(
        None, "Your own rule: CSV with the columns input and class, or JSON."
    ),
    pairs: Path | None = opt.PAIRS,
    labels: list[str] | None = option(
        None, "A label of a rule task; repeat, one for each class. By default A, B, ...", "--label"
    ),
    other: str | None = option(None, "Another task, for controls."),
    shots: int = option(16, opt.SHOTS),
    samples: int = option(64, "Prompts."),
    few: int = option(16, "Prompts of what takes longest, such as contributions."),
    layers: str | None = option(None, "For example 0,6,12-30. By default each experiment's own."),
    memory: float = option(4.0, "GiB to use beside the model's weights."),
    seed: int = option(0, "Seed of the sampling and of all controls."),
    out: Path = option("spade-lens-icl", opt.OUT),
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    debug: bool = opt.DEBUG,
) -> None:
    """Find where the rule of a prompt lives: experiments on in-context learning, on one task.

    Prints a table and writes figures, CSVs and a JSON for every experiment. After an interruption
    the same command resumes.
    """
    params = locals()
    with plain_errors(debug):
        if classes is not None and pairs is not None:
            raise ValueError("--classes and --pairs were given; a run has one task. Give either.")
        from spade_lens.studies.icl.plan import IclPlan

        run_plan(IclPlan, params, task=classes or pairs or task)


def speculate(
    model: str = opt.MODEL,
    data: Path | None = option(
        None,
        "Your own prompts: one a line, or JSON lines (.jsonl) with prompt and perhaps kind. By "
        "default 24 short ones of four kinds.",
    ),
    samples: int | None = option(None, "Prompts of every kind. By default all."),
    layers: str | None = option(None, "Layers that draft, such as 4,8,16-20. By default six."),
    drafts: str = option("1-4,6,8", "Tokens drafted in a round."),
    eta: list[float] = option(
        [0.0], "A draft ends after a token less probable than this; repeat for several."
    ),
    max_new_tokens: int = option(48, "Tokens of every text at most."),
    lookups: bool = option(
        True, "Whether n-grams of the text draft too.", "--lookups/--no-lookups"
    ),
    timed: int = option(3, "Settings that are run and timed, the best by prediction; 0 for none."),
    rounds: int = option(2, "Turns of every setting on every prompt."),
    seed: int = option(0, "Seed of the order in which parts of a round are timed."),
    out: Path = option("spade-lens-speculate", opt.OUT),
    device: str = opt.DEVICE,
    dtype: DType = opt.DTYPE,
    fresh: bool = option(False, "Measure everything again.", "--fresh"),
    debug: bool = opt.DEBUG,
) -> None:
    """Find the layer that should draft, and how many tokens: acceptance, costs, measured speed.

    Prints a table and writes figures, CSVs and a JSON. After an interruption the same command
    resumes.

    The default took 36 minutes on one busy core. A first look: --samples 1 --layers 8,24
    --max-new-tokens 12 --timed 1 --rounds 1.
    """
    params = locals()
    with plain_errors(debug):
        lengths = parse_layers(drafts, "--drafts", "number")
        from spade_lens.studies.speculation.plan import SpeculationPlan

        run_plan(SpeculationPlan, params, prompts=data, drafts=lengths)


def in_context(
    seeds: list[int] | None = option(None, "A seed; repeat for several. By default 0.", "--seed"),
    d: int = option(4, "Dimension of inputs and of their representation."),
    examples: int = option(12, "Examples in every prompt."),
    depth: int = option(1, "Layers of the representation."),
    noise: float = option(0.1, "Standard deviation of the noise of labels."),
    representations: int = option(1, "Representations, of which every prompt has one."),
    form: str = option("supervised", "supervised or dynamical."),
    steps: int = option(3600, "Steps of training."),
    n_layers: int = option(5, "Blocks of the network."),
    width: int = option(64, "Width of the network."),
    prompts: int = option(1000, "Prompts to measure on."),
    paste_steps: int = option(400, "Steps of every pasted input layer; 0 for no pasting."),
    parts: list[str] | None = option(
        None, "risk, probes, pasting, validation, selection; repeat. By default all.", "--part"
    ),
    out: Path = option("spade-lens-in-context", opt.OUT),
    fresh: bool = option(False, "Train and measure everything again.", "--fresh"),
    debug: bool = opt.DEBUG,
) -> None:
    """Train small transformers that learn in context, and hold methods against what is exact.

    Prints a table and writes figures, CSVs and a JSON. After an interruption the same command
    resumes. The default took about five minutes of one processor a seed.
    """
    with plain_errors(debug):
        from dataclasses import replace

        from spade_lens.studies.base import study
        from spade_lens.studies.in_context.plan import PARTS, InContextPlan
        from spade_lens.training.in_context.fitted import RECIPE
        from spade_lens.training.in_context.network import NetworkSize
        from spade_lens.training.in_context.task import InContextTask

        task = InContextTask(
            d_x=d,
            d_phi=d,
            examples=examples,
            depth=depth,
            noise=noise,
            representations=representations,
            form=form,  # type: ignore[arg-type]
        )
        warmup = min(RECIPE.warmup, max(0, steps // 10))
        plan = InContextPlan(
            task,
            NetworkSize(n_layers, width),
            replace(RECIPE, steps=steps, warmup=warmup),
            seeds or (0,),
            prompts=prompts,
            paste_steps=paste_steps,
            parts=parts or PARTS,
            out=out,
        )
        with interruptible():
            study(plan, fresh=fresh)
