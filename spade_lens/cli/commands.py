"""The commands of ``spade-lens``, put together.

Whatever imports torch or pandas is imported inside the commands, so that ``--help`` need not wait
for it.
"""

import typer

from spade_lens.cli.generation import generate
from spade_lens.cli.lenses import fit, read
from spade_lens.cli.studies import demo, exit_, icl, in_context, speculate

app = typer.Typer(
    name="spade-lens",
    help="What would the model say if it stopped at this layer?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(read)
app.command()(generate)
app.command()(demo)
app.command()(fit)
app.command("exit")(exit_)
app.command()(icl)
app.command()(speculate)
app.command("in-context")(in_context)


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
        word_pairs = pairs_named(name)
        (given, output), *_ = word_pairs.pairs
        typer.echo(f"{name:<18}{len(word_pairs.pairs):>4} pairs   {given} -> {output}")
        typer.echo(f"{'':<18}{word_pairs.description}")
    typer.echo("\nFor `icl` also rules, whose labels the demonstrations define:\n")
    for name in task_names("rule"):
        typer.echo(f"{name:<18}{rule_named(name).description}")
    typer.echo("  and two of these categories, such as animal/country:")
    typer.echo("  " + ", ".join(task_names("category")))
    typer.echo("\nFor `exit` also these decisions, whose data are downloaded on first use:")
    typer.echo("  " + ", ".join(task_names("decision")))


def _show_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"spade-lens {version('spade-lens')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Run ``spade-lens``."""
    app()


if __name__ == "__main__":
    main()
