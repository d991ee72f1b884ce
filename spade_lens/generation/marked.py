"""Texts as HTML for notebooks, with the accepted drafts marked. Every text stays text.

This module knows words and numbers, and nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from spade_lens.checks import visible

_TEXT = (
    "white-space:pre-wrap;overflow-wrap:anywhere;max-height:24em;overflow:auto;"
    "border-left:3px solid #8888;padding-left:.7em;margin:.6em 0"
)
_ACCEPTED = "color:inherit;background:#56B4E955;border-bottom:2px solid #0072B2"


@dataclass(frozen=True)
class Marked:
    """One text: what is shown before it, its tokens, and which of them were accepted drafts.

    Args:
        prompt: The text before it.
        text: The text.
        words: The text of every token.
        logprobs: Their log-probabilities.
        accepted: Whether a token was drafted and accepted.
    """

    prompt: str
    text: str
    words: Sequence[str]
    logprobs: Sequence[float]
    accepted: Sequence[bool]

    def html(self) -> str:
        """Return it as HTML."""
        spans = [f'<span style="opacity:.6">{_escaped(self.prompt)}</span>']
        tokens = zip(pieces(self.text, self.words), self.logprobs, self.accepted, strict=True)
        for piece, logprob, accepted in tokens:
            if not piece:
                continue
            tag, style = ("mark", f' style="{_ACCEPTED}"') if accepted else ("span", "")
            draft = ", an accepted draft" if accepted else ""
            title = f"log-probability {logprob:.2f}{draft}"
            spans.append(f'<{tag}{style} title="{title}">{_escaped(piece)}</{tag}>')
        return f'<div style="{_TEXT}">{"".join(spans)}</div>'


def page(caption: str, texts: Sequence[Marked], more: int) -> str:
    """Return texts below each other, with a caption and how many are left out."""
    end = f"<div>... {more} more</div>" if more else ""
    return f"<div>{_escaped(caption)}</div>{''.join(text.html() for text in texts)}{end}"


def pieces(text: str, words: Sequence[str]) -> list[str]:
    r"""Return what every token adds to a text. Together they are the text.

    A character of several tokens goes to the last of them. A token that a text does not show,
    such as its end, adds nothing.

    Example:
        >>> pieces("a\u00e9b", ["a", "\ufffd", "\ufffd", "b", "</s>"])
        ['a', '', '\xe9', 'b', '']
    """
    found, at = [""] * len(words), 0
    waiting: list[int] = []
    for n, word in enumerate(words):
        # Between tokens that were found there are those that wait, or a space between numbers.
        room = 1 + sum(len(words[i]) for i in waiting)
        start = -1 if "\ufffd" in word else text.find(word, at, at + room + len(word))
        if start < 0 or not word:
            waiting.append(n)
            continue
        stop = start + len(word)
        if waiting:
            found[waiting[-1]], found[n] = text[at:start], word
        else:
            found[n] = text[at:stop]
        waiting, at = [], stop
    if waiting:
        found[waiting[0]] = text[at:]
    return found


def _escaped(text: str) -> str:
    return escape(visible(text))
