"""Tokens as text that a reader can see: in figures, tables and pages.

This module knows tables and their columns, not what made them.
"""

import unicodedata
from collections.abc import Sequence

import pandas as pd

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "→"})
"""What stands for white space."""
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that a page obeys or hides instead of showing them."""


def shown_text(text: str, most: int = 120) -> str:
    r"""Return a text as a page shows it: characters that nobody would see are written out.

    Among them are those that turn the direction of a text, have no width, or that a terminal obeys.

    Example:
        >>> shown_text("a b\x1b[1m"), shown_text("\u202eab")
        ('a b\\x1b[1m', '\\u202eab')
        >>> shown_text("ab" * 9, most=4)
        'abab… (18 characters)'

    Args:
        text: The text.
        most: How many characters of it to show.
    """
    cut = "".join(ascii(c)[1:-1] if unicodedata.category(c) in _UNSEEN else c for c in text[:most])
    return cut if len(text) <= most else f"{cut}… ({len(text)} characters)"


def shown_token(token: str, most: int = 120) -> str:
    r"""Return a token as a page shows it: as :func:`shown_text`, and white space is visible.

    Example:
        >>> shown_token(" a\n"), shown_token("\x00")
        ('·a↵', '\\x00')

    Args:
        token: The token.
        most: How many characters of it to show.
    """
    return shown_text(token.translate(VISIBLE), most)


def text_tokens(frame: pd.DataFrame, positions: Sequence[int]) -> list[str]:
    """Return the tokens of a text that was read: each is the target of the position before.

    The first token is no target, and neither is one whose position before was not read.

    Example:
        >>> text_tokens(read("ab->AB", model=model, positions="all").to_frame(), [0, 1, 2, 9])
        ['(start)', 'a', 'b', '9']

    Args:
        frame: A readout of one text.
        positions: Whose tokens to return.
    """
    following = {}
    if "target" in frame.columns:
        following = dict(zip(frame["position"] + 1, frame["target"], strict=True))
    return [following.get(p) or ("(start)" if p == 0 else str(p)) for p in positions]
