"""The command line: ``spade-lens demo``, ``fit``, ``exit``, ``icl``, ``models``, ``tasks``.

Says what went wrong in one message, without a traceback. Whatever imports torch is imported
inside the commands, so that ``--help`` need not wait for it.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from spade_lens.cli.options import (
    DEFAULT,
    Debug,
    Device,
    DType,
    Dtype,
    LensKind,
    ModelName,
    Out,
    Pairs,
    interruptible,
    parse_layers,
    plain_errors,
)

app = typer.Typer(
    name="spade-lens",
    help="What would the model say if it stopped at this layer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    model: ModelName = DEFAULT,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; repeat for several. All by default.")
    ] = None,
    pairs: Pairs = None,
    shots: Annotated[int, typer.Option(help="Demonstrations in every prompt.")] = 8,
    samples: Annotated[int, typer.Option(help="Prompts of every task.")] = 40,
    layers: Annotated[
        str | None, typer.Option(help="For example 0,6,12-30. All by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling of prompts.")] = 0,
    out: Out = Path("spade-lens-demo"),
    device: Device = "cpu",
    dtype: Dtype = DType.float32,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Read finished tasks again.", show_default=False)
    ] = False,
    debug: Debug = False,
) -> None:
    """Read several tasks at every layer with the logit lens, SPADE and its ablation.

    Prints a table and writes figures, CSVs and a JSON. A run that was interrupted goes on where
    it stopped when started again.
    """
    with plain_errors(debug):
        import torch

        from spade_lens.models.catalogue import catalog
        from spade_lens.models.loading import load
        from spade_lens.studies.lenses import plan_demo, run_demo

        known = catalog().set_index("name")["n_layers"]
        plan = plan_demo(
            tasks=task or None,
            pairs=pairs,
            shots=shots,
            samples=samples,
            layers=None if layers is None else parse_layers(layers),
            seed=seed,
            out=out,
            n_layers=int(known[model]) if model in known else None,
        )
        loaded = load(model, device=device, dtype=getattr(torch, dtype))
        with interruptible():
            run_demo(loaded, plan, fresh=fresh)


@app.command()
def fit(
    model: ModelName = DEFAULT,
    kind: Annotated[
        LensKind, typer.Option(help="What to fit: L-SPADE or the tuned lens.")
    ] = LensKind.l_spade,
    text: Annotated[
        str | None,
        typer.Option(
            help="A text file, a folder of them, or a Hugging Face data set. By default the model "
            "writes the text itself."
        ),
    ] = None,
    pieces: Annotated[int, typer.Option(help="Pieces of text.")] = 160,
    piece_tokens: Annotated[int, typer.Option(help="Tokens of a piece.")] = 128,
    per_piece: Annotated[int, typer.Option(help="Positions learned from in every piece.")] = 32,
    layers: Annotated[
        str | None, typer.Option(help="For example 12-29. All below the last by default.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="L-SPADE: rank of what a map adds. Any by default.")
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(help="Passes of descent on KL: 2 for the tuned lens, 0 for L-SPADE."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every choice.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder. By default the cache, where `exit` looks for it."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = DType.float32,
    debug: Debug = False,
) -> None:
    """Fit a linear lens, L-SPADE or the tuned lens, and report it on held-out text.

    A fit that was interrupted goes on where it stopped when started again.
    """
    with plain_errors(debug):
        import torch

        from spade_lens.models.loading import load
        from spade_lens.studies.fit import fit_lens, held_out_text, lens_folder

        if rank is not None and kind is not LensKind.l_spade:
            raise ValueError("--rank is for --kind l-spade; the tuned lens' maps are whole.")
        wanted = None if layers is None else parse_layers(layers)
        options: dict[str, Any] = {"layers": wanted, "per_piece": per_piece}
        if passes is not None:
            options["passes"] = passes
        if kind is LensKind.l_spade:
            options["rank"] = rank
        loaded = load(model, device=device, dtype=getattr(torch, dtype))
        with interruptible():
            lens = fit_lens(
                loaded,
                kind.value,
                text=text,
                n_pieces=pieces,
                n_tokens=piece_tokens,
                seed=seed,
                out=out,
                **options,
            )
        typer.echo(f"\n{lens!r}, on documents that it was not fitted on:\n")
        typer.echo(held_out_text(lens.held_out))
        typer.echo(f"\nIn {lens_folder(loaded, kind.value) if out is None else out}")


@app.command("exit")
def exit_(
    task: Annotated[
        str | None,
        typer.Option(help="A decision task or a word-pair task; see `tasks`. By default sst2."),
    ] = None,
    model: ModelName = DEFAULT,
    pairs: Pairs = None,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="What is checked: l-spade, tuned, logit, or the folder of a fitted lens; repeat "
            "for several. By default l-spade, which is fitted where there is none yet."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A keep set, such as 'start+answer'; repeat for several. All tried."),
    ] = None,
    loss: Annotated[
        list[float] | None,
        typer.Option(help="A loss of accuracy allowed; repeat. Best accuracy and 0.01 by default."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Demonstrations in every prompt. The task's own.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Prompts that all is chosen on.")] = 150,
    samples: Annotated[int, typer.Option(help="Other prompts, to measure on.")] = 200,
    layers: Annotated[
        str | None, typer.Option(help="Candidate layers, for example 12,18,24. Eight, evenly.")
    ] = None,
    guarantee: Annotated[
        float | None, typer.Option(help="A loss to be guaranteed for new prompts.")
    ] = None,
    risk: Annotated[float, typer.Option(help="The chance that the guarantee fails.")] = 0.05,
    race: Annotated[int, typer.Option(help="Prompts that are run against the clock.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of that; 0 measures no time.")] = 9,
    max_tokens: Annotated[int | None, typer.Option(help="Longer prompts are passed over.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling and the bootstrap.")] = 0,
    out: Out = Path("spade-lens-exit"),
    device: Device = "cpu",
    dtype: Dtype = DType.float32,
    debug: Debug = False,
) -> None:
    """Early exit on one task: choose on some prompts, measure on others, race the plain model.

    Prints a table and writes figures, CSVs and a JSON. A run that was interrupted goes on where
    it stopped when started again.
    """
    with plain_errors(debug):
        import torch

        from spade_lens.models.loading import load
        from spade_lens.studies.exits.plan import LOSSES, plan_exit
        from spade_lens.studies.exits.result import run_exit
        from spade_lens.studies.fit import named_lens
        from spade_lens.tasks.word_pairs import WordPairTask

        if task is not None and pairs is not None:
            raise ValueError("--task and --pairs were both given; a study is of one task.")
        plan = plan_exit(
            (task or "sst2") if pairs is None else WordPairTask.from_file(pairs),
            shots=shots,
            calibration=calibration,
            samples=samples,
            losses=loss or LOSSES,
            keep=keep or "auto",
            layers=None if layers is None else parse_layers(layers),
            guarantee=guarantee,
            risk=risk,
            race=race,
            rounds=rounds,
            max_tokens=max_tokens,
            seed=seed,
            out=out,
        )
        loaded = load(model, device=device, dtype=getattr(torch, dtype))
        plan.candidate_layers(loaded.n_layers)  # refuses before a lens is fitted
        with interruptible():
            run_exit(loaded, plan, [named_lens(loaded, name) for name in lens or ["l-spade"]])


@app.command()
def icl(
    task: Annotated[
        str,
        typer.Option(
            help="Two categories with a slash between them, a rule, or word pairs; see `tasks`."
        ),
    ] = "animal/country",
    model: ModelName = DEFAULT,
    experiment: Annotated[
        list[str] | None,
        typer.Option(
            help="shots, patching, contributions, heads, knockout, saliency, geometry, "
            "sufficiency or reading; repeat for several; 'all' for all. Patching by default."
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Your own rule: CSV with the columns input and class, or JSON."),
    ] = None,
    pairs: Pairs = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A label of a rule task; repeat, one for each class. A, B, ..."),
    ] = None,
    other: Annotated[str | None, typer.Option(help="Another task, for controls.")] = None,
    shots: Annotated[int, typer.Option(help="Demonstrations in every prompt.")] = 16,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 64,
    few: Annotated[
        int, typer.Option(help="Prompts of what takes longest, such as contributions.")
    ] = 16,
    layers: Annotated[
        str | None, typer.Option(help="For example 0,6,12-30. Each experiment's own by default.")
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB to take beside the model's weights.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the sampling and of all controls.")] = 0,
    out: Out = Path("spade-lens-icl"),
    device: Device = "cpu",
    dtype: Dtype = DType.float32,
    debug: Debug = False,
) -> None:
    """Where the rule of a prompt lives: experiments on in-context learning, on one task.

    Prints a table and writes figures, CSVs and a JSON for every experiment. A run that was
    interrupted goes on where it stopped when started again.
    """
    with plain_errors(debug):
        import torch

        from spade_lens.models.catalogue import catalog
        from spade_lens.models.loading import load
        from spade_lens.settings import Settings
        from spade_lens.studies.icl.plan import EXPERIMENTS, plan_icl
        from spade_lens.studies.icl.result import run_icl
        from spade_lens.tasks.rules import RuleTask
        from spade_lens.tasks.word_pairs import WordPairTask

        if classes is not None and pairs is not None:
            raise ValueError("--classes and --pairs were given; a run has one task. Give either.")
        own = RuleTask.from_file(classes) if classes is not None else None
        known = catalog().set_index("name")["n_layers"]
        chosen = experiment or ["patching"]
        plan = plan_icl(
            own or (task if pairs is None else WordPairTask.from_file(pairs)),
            EXPERIMENTS if "all" in chosen else chosen,
            samples=samples,
            shots=shots,
            labels=label,
            other=other,
            few=few,
            layers=None if layers is None else parse_layers(layers),
            seed=seed,
            out=out,
            n_layers=int(known[model]) if model in known else None,
        )
        loaded = load(model, device=device, dtype=getattr(torch, dtype))
        loaded.settings = Settings(memory_limit=memory)
        with interruptible():
            run_icl(loaded, plan)


@app.command()
def models() -> None:
    """List the models that need no model hub."""
    from spade_lens.models.catalogue import catalog

    for entry in catalog().itertuples():
        typer.echo(entry.name)
        typer.echo(f"    {entry.architecture}")
        typer.echo(f"    {entry.download_mb:.0f} MB from {entry.source}; {entry.licence}")
    typer.echo("Every other name is looked up on the Hugging Face hub.")


@app.command()
def tasks() -> None:
    """List the tasks that come with the library."""
    from spade_lens.tasks.categories import rule_named
    from spade_lens.tasks.resolve import task_names
    from spade_lens.tasks.word_pairs import pairs_named

    for name in task_names("pairs"):
        found = pairs_named(name)
        (given, output), *_ = found.pairs
        typer.echo(f"{name:<18}{len(found.pairs):>4} pairs   {given} -> {output}")
        typer.echo(f"{'':<18}{found.description}")
    typer.echo("\nFor `icl` also rules, whose labels the demonstrations define:\n")
    for name in task_names("rule"):
        typer.echo(f"{name:<18}{rule_named(name).description}")
    typer.echo("  and two of these categories, such as animal/country:")
    typer.echo("  " + ", ".join(task_names("category")))
    typer.echo("\nFor `exit` also these decisions, whose data are downloaded on first use:")
    typer.echo("  " + ", ".join(task_names("decision")))


def main() -> None:
    """The entry point of ``spade-lens``."""
    app()


if __name__ == "__main__":
    main()
