"""The command line; ``main`` is the entry point of ``spade-lens``."""

from spade_lens.cli.commands import main

__all__ = ["main"]
