"""Exit from the prompt at a layer, keep a few of its tokens above it, and go on writing.

The prompt runs to a layer. The kept tokens alone run to the top. Every new token runs through all
blocks: below the layer it sees the whole prompt, above it the kept tokens and the new ones. So the
prompt's compute and cache above the layer shrink to the kept tokens. The idea is SPADE's (Zheng,
Ma, Lin, Yang, arXiv 2507.17618), which reads one token; that text may go on is ours.

With shortcuts the tokens that are not kept still give keys and values above the layer, predicted
from their residuals there. This saves nearly as much compute, and none of the cache.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import check_number, whole_numbers
from spade_lens.generation.rows import Rows, Run
from spade_lens.generation.shortcuts import Shortcuts
from spade_lens.generation.strategy import PlainWriter
from spade_lens.lenses.keep import Keep, KeepRule, name_of
from spade_lens.models.hooks import rows_are
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True)
class ExitPrefill:
    """Stop the prompt at a layer, and go on with a few of its tokens.

    Example:
        >>> from spade_lens.generation import ExitPrefill
        >>> sl.generate("abcabc", 4, model=model, strategy=ExitPrefill(2, keep=sl.Keep(last=3)))
        Generated(1 text of tiny-llama, 4 tokens, exit prefill at 2, start+last 3)

    Args:
        layer: The layer, from 1 to ``n_layers``, where this is plain decoding.
        keep: Which tokens go on: a :class:`spade_lens.Keep` or any function of the prompt and its
            last position. The paper's two by default. The last one always goes on.
        shortcuts: From :func:`fit_shortcuts`: all other tokens then give keys and values above the
            layer. Without them they are not seen there.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the layer is below 1, or above the model's last when it runs, or the
            shortcuts start at another layer or belong to another model.
    """

    layer: int
    keep: KeepRule = field(default_factory=Keep)
    shortcuts: Shortcuts | None = None
    drafts: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_number("layer", self.layer, least=1)
        if not callable(self.keep):
            raise TypeError(
                f"keep={self.keep!r} was given; expected a Keep, or a function of a prompt and its "
                "last position."
            )
        if self.shortcuts is None:
            return
        if not isinstance(self.shortcuts, Shortcuts):
            raise TypeError(
                f"shortcuts={self.shortcuts!r} was given; expected what fit_shortcuts() returns."
            )
        if self.shortcuts.layer != self.layer:
            raise ValueError(
                f"The shortcuts start at layer {self.shortcuts.layer} and layer={self.layer} was "
                "given; expected the same layer."
            )

    @property
    def name(self) -> str:
        """The name in tables."""
        rest = "" if self.shortcuts is None else ", rest mapped"
        return f"exit prefill at {self.layer}, {name_of(self.keep)}{rest}"

    @property
    def borders(self) -> tuple[int, ...]:
        """The layer."""
        return (self.layer,)

    def writer(self, rows: Rows) -> "_AfterExit":
        """Return what writes a batch."""
        if self.shortcuts is not None:
            self.shortcuts.refuse_another(rows.model)
        return _AfterExit(rows, self)


class _AfterExit(PlainWriter):
    def __init__(self, rows: Rows, strategy: ExitPrefill) -> None:
        super().__init__(rows)
        self._keep, self._shortcuts = strategy.keep, strategy.shortcuts

    def prefill(self) -> None:
        """Run all of the prompts but their last tokens, which then run as new tokens do."""
        if any(len(tokens) > 1 for tokens in self.rows.tokens):
            self._climb(but=1)

    def read_first(self) -> Float[Tensor, "row d_vocab"]:
        """Run the prompts; return the logits of every row's first new token."""
        last = self._climb(but=0).last()
        with rows_are(self.rows.numbers):
            return self.rows.logits(last)

    def _climb(self, *, but: int) -> Run:
        """Run the prompts without so many of their last tokens, and return what goes on."""
        rows = self.rows
        prompts = [rows.steering.prompts[i] for i in rows.numbers]
        tokens = [prompt.tokens[: len(prompt) - but] for prompt in prompts]
        above = [kept_positions(self._keep, p)[: -but or None] for p in prompts]
        below = rows.climb(rows.enter(tokens, rows.done), 0)
        if self._shortcuts is not None:
            rest = [
                sorted({*range(len(of_row))} - {*kept})
                for of_row, kept in zip(tokens, above, strict=True)
            ]
            rows.fill(_some(below, rest), 1, self._shortcuts.keys_alone)
        rows.done = list(map(len, tokens))
        return rows.climb(_some(below, above), 1)


def _some(run: Run, columns: list[list[int]]) -> Run:
    """Select tokens; of a row that has none, one that does not count."""
    chosen = run.select([of_row or [0] for of_row in columns])
    return replace(chosen, counts=list(map(len, columns)))


def kept_positions(keep: KeepRule, prompt: Prompt) -> list[int]:
    """Return which positions of a prompt go on, ascending, the last one among them.

    Raises:
        TypeError: If the rule gives something else than positions.
        ValueError: If it gives positions outside the prompt.
    """
    n = len(prompt)
    positions = whole_numbers(
        keep(prompt, n - 1),
        f"positions of the keep rule {name_of(keep)!r}: ",
        f"positions 0 to {n - 1}, each once",
        below=n,
        empty=True,
    )
    return sorted({*positions, n - 1})
