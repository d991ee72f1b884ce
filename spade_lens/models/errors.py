"""Errors of this floor that a caller may want to tell apart."""

from typing import Any


class UnsupportedModelError(ValueError):
    """The model cannot be taken apart exactly, and the message says why."""


def refuse_vectors(backbone: Any, name: str) -> None:
    """Raise if a model reads vectors, and so has no vocabulary.

    Args:
        backbone: The model in pieces.
        name: What messages call it.

    Raises:
        UnsupportedModelError: If it does.
    """
    if not getattr(backbone, "reads_tokens", True):
        raise UnsupportedModelError(
            f"{name} reads vectors and gives {backbone.d_vocab} numbers: it has no vocabulary, so "
            "prompts, tokens and lenses mean nothing for it. Use model.run_blocks, "
            "model.final_norm and model.unembed on residuals, or model.bridge on vectors."
        )
