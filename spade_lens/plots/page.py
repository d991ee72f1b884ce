"""The page that figures are made for: its width and the size of its letters, in one place.

This module knows nothing of figures.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """The size of figures. Inside ``with Page(...):`` all figures are made for that page.

    Example:
        >>> with sl.plots.Page(width=3.3):
        ...     figure = sl.plot(sl.read("ab->AB,cd->", model=model))
        >>> float(figure.get_figwidth())
        3.3

    Args:
        width: Width of a figure in inches. The default spans both columns of a paper.
        font_size: Size of letters in points at the figure's own size. Tick labels are one point
            smaller.

    Raises:
        ValueError: If a size is not positive.
    """

    width: float = 6.9
    font_size: float = 8

    def __post_init__(self) -> None:
        for name in ("width", "font_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; expected more than 0.")

    def __enter__(self) -> "Page":
        _pages.set((*_pages.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _pages.set(_pages.get()[:-1])


_pages: ContextVar[tuple[Page, ...]] = ContextVar("pages", default=(Page(),))


def page() -> Page:
    """Return the page in force."""
    return _pages.get()[-1]
