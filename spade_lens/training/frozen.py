"""A model that is run but not trained: no gradient reaches its weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from spade_lens.models.model import Model


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Let no gradient reach a model's weights."""
    weights = [p for p in model.original.parameters() if p.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
