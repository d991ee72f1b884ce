"""Exit from the prompt at a layer, keep a few of its tokens above it, and go on writing.

The prompt runs to a layer. The kept tokens alone run to the top. Every new token runs through all
blocks: below the layer it sees the whole prompt, above it the kept tokens and the new ones. So the
prompt's compute and cache above the layer shrink to the kept tokens. The idea is SPADE's (Zheng,
Ma, Lin, Yang, arXiv 2507.17618), which reads one token; that text may go on is ours.

With shortcuts the tokens that are not kept still give keys and values above the layer, predicted
from their residuals there. This saves nearly as much compute, and none of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import as_several, check_number, is_whole, whole_numbers
from spade_lens.exits.calibration import ExitRule
from spade_lens.exits.checking import Checking
from spade_lens.exits.engine import SpadeExit
from spade_lens.generation.rows import Rows, Run
from spade_lens.generation.shortcuts import Shortcuts
from spade_lens.generation.strategy import PlainWriter, Round
from spade_lens.lenses.keep import Keep, KeepRule, name_of
from spade_lens.lenses.named import as_lenses
from spade_lens.lenses.spade import Spade
from spade_lens.models.hooks import numbered, rows_are
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True)
class ExitPrefill:
    """Stop the prompt at a layer, and go on with a few of its tokens.

    Example:
        >>> from spade_lens.exits import SpadeExit, Threshold
        >>> from spade_lens.generation import ExitPrefill
        >>> sl.generate("abcabc", 4, model=model, strategy=ExitPrefill(2, keep=sl.Keep(last=3)))
        Generated(1 text of tiny-llama, 4 tokens, exit prefill at 2, start+last 3)
        >>> rule = SpadeExit(model, "logit", Threshold(0.0), layers=[2, 3])
        >>> sl.generate(["ab", "abc"], 4, model=model, strategy=ExitPrefill(rule)).prompt_exit_layer
        tensor([2, 2])

    Args:
        layer: The layer, from 1 to ``n_layers``, where this is plain decoding. Or a rule that
            decides for every prompt: what ``calibrate().best()`` gives, or a
            :class:`~spade_lens.exits.SpadeExit` of your own. It is asked at the last token, and
            what it allows to lose is answers, not text: measure that. Of
            prompts that run side by side, one that leaves saves compute only as far as the
            others leave too; ``batch_size=1`` in the settings saves it for each.
        keep: Which tokens go on: a :class:`spade_lens.Keep` or any function of the prompt and its
            last position. By default a rule's own, or the paper's two. The last one always goes on.
        shortcuts: From :func:`fit_shortcuts`: all other tokens then give keys and values above the
            layer. Without them they are not seen there. For a rule, one for each layer where it
            may leave, but for that of the last block, which needs none.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the layer is below 1, or above the model's last when it runs, the shortcuts
            start at other layers, rule or shortcuts belong to another model, or a rule that does
            not answer by SPADE comes without a keep set.
    """

    layer: int | ExitRule | SpadeExit
    keep: KeepRule | None = None
    shortcuts: Shortcuts | Sequence[Shortcuts] | None = None
    drafts = 0

    def __post_init__(self) -> None:
        engine = self.engine
        if engine is None:
            if not is_whole(self.layer):
                raise TypeError(
                    f"layer={self.layer!r} was given; expected a layer, or a rule such as "
                    "calibrate(...).best(0.01)."
                )
            check_number("layer", self.layer, least=1)
        elif self.keep is None and not isinstance(engine.answerer, Spade):
            raise ValueError(
                f"The rule answers by {engine.answerer.name!r}, which keeps no tokens, and there "
                "is no keep=; give one."
            )
        if self.keep is not None and not callable(self.keep):
            raise TypeError(
                f"keep={self.keep!r} was given; expected a Keep, or a function of a prompt and its "
                "last position."
            )
        each = self._shortcuts
        for one in each:
            if not isinstance(one, Shortcuts):
                raise TypeError(
                    f"shortcuts={one!r} was given; expected what fit_shortcuts() gives."
                )
        layers = sorted(one.layer for one in each)
        # The last block's keys and values are its own, so that none is fitted for it.
        last = each[0].model.n_layers - 1 if each else None
        wanted = [layer for layer in self.borders if engine is None or layer != last]
        if self.shortcuts is not None and layers != wanted:
            raise ValueError(
                f"The shortcuts start at {layers or 'no layer'}, and the prompt may leave at "
                f"{wanted}; expected one for each of these."
            )

    @cached_property
    def engine(self) -> SpadeExit | None:
        """What decides for every prompt; None where one layer does."""
        if isinstance(self.layer, ExitRule):
            return self.layer.engine()
        return self.layer if isinstance(self.layer, SpadeExit) else None

    @cached_property
    def kept(self) -> KeepRule:
        """Which tokens go on."""
        if self.keep is not None:
            return self.keep
        answerer = None if self.engine is None else self.engine.answerer
        return answerer.rule if isinstance(answerer, Spade) else Keep()

    @cached_property
    def _shortcuts(self) -> list[Any]:
        """What was given as shortcuts, one by one."""
        if self.shortcuts is None:
            return []
        several = as_several(self.shortcuts)
        return [self.shortcuts] if several is None else several

    @property
    def mapped(self) -> dict[int, Shortcuts]:
        """The shortcuts by layer."""
        return {one.layer: one for one in self._shortcuts}

    @property
    def name(self) -> str:
        """The name in tables."""
        at: Any = self.layer if self.engine is None else self.engine.policy.name
        rest = ", rest mapped" if self.mapped else ""
        if self.engine is not None and self.engine.check is not None:
            at = f"{at} of {self.engine.check.name}"
        return f"exit prefill at {at}, {name_of(self.kept)}{rest}"

    @property
    def borders(self) -> tuple[int, ...]:
        """The layers where prompts may leave."""
        return (self.layer,) if self.engine is None else self.engine.stops  # type: ignore[return-value]

    def writer(self, rows: Rows) -> "_AfterExit":
        """Return what writes a batch.

        Raises:
            ValueError: If rule or shortcuts are another model's, a rule's check cannot read the
                prompts, or it was chosen for a confidence over candidates and they have none.
        """
        for shortcuts in self.mapped.values():
            shortcuts.refuse_another(rows.model)
        if self.engine is not None:
            as_lenses(self.engine.answerer, rows.model)  # refuses one of another model
            self.engine.setup.prompts(rows.steering.prompts)  # refuses what its check cannot read
            self.engine.refuse_another_scale(rows.steering.prompts)
        return _AfterExit(rows, self)


class _AfterExit(PlainWriter):
    def __init__(self, rows: Rows, strategy: ExitPrefill) -> None:
        super().__init__(rows)
        self._strategy, self._mapped = strategy, strategy.mapped
        self._at: list[int] = []

    def prefill(self) -> None:
        """Run the prompts, and forget their last tokens, which then run as new tokens do."""
        rows = self.rows
        if all(len(tokens) == 1 for tokens in rows.tokens):
            return
        self._climb()
        for cache in rows.caches:
            cache.crop([length - 1 for length in cache.lengths])
        rows.done = [done - 1 for done in rows.done]

    def read_first(self) -> Float[Tensor, "row d_vocab"]:
        """Run the prompts; return the logits of every row's first new token."""
        last = self._climb().last()
        with rows_are(self.rows.numbers):
            return self.rows.logits(last)

    def round(self) -> list[Round]:
        """Return one new token of every row; the first says where the prompt left."""
        first = not any(self.rows.done)
        found = super().round()
        if not first or self._strategy.engine is None:
            return found
        return [replace(one, prompt_layer=at) for one, at in zip(found, self._at, strict=True)]

    def _climb(self) -> Run:
        """Run the prompts, and return what of them came to the top."""
        rows, engine = self.rows, self._strategy.engine
        if self._mapped and len(rows.numbers) > 1:
            # Columns are written after the longest row's, and rows keep unequal numbers of tokens.
            # The memory is there: a batch is planned with half of it.
            rows.widen(max(map(len, rows.tokens)))
        prompts = [rows.steering.prompts[i] for i in rows.numbers]
        checking = None
        if engine is not None:
            checking = Checking(engine.setup.head, engine.check, engine.policy)
        going = list(range(len(prompts)))
        self._at = [rows.model.n_layers] * len(prompts)
        run = rows.climb(rows.enter([p.tokens for p in prompts], rows.done), 0)
        for span, layer in enumerate(self._strategy.borders, start=1):
            left = going
            if checking is not None and going:
                some = [prompts[row] for row in going]
                with numbered([rows.numbers[row] for row in going]):
                    _, leaves = checking.at(run.resid, going, some, layer)
                checking.keep(~leaves)
                left = [row for row, goes in zip(going, leaves.tolist(), strict=True) if goes]
            for row in left:
                self._at[row] = layer
            run = self._leave(run, left, prompts, span)
            going = [row for row in going if row not in left]
            run = rows.climb(run, span)
        rows.done = [len(prompt) for prompt in prompts]
        return run

    def _leave(self, run: Run, left: Sequence[int], prompts: Sequence[Prompt], span: int) -> Run:
        """Let rows go on with the kept tokens alone; the others give keys and values at most."""
        rows = self.rows
        kept = {row: kept_positions(self._strategy.kept, prompts[row]) for row in left}
        if self._mapped and kept:
            shortcuts = self._mapped.get(rows.borders[span])
            rest = [
                sorted({*range(len(prompt))} - {*kept[row]}) if row in kept else []
                for row, prompt in enumerate(prompts)
            ]
            for above in range(span, len(rows.borders) - 1):
                change = None if shortcuts is None else shortcuts.keys_alone
                rows.fill(_some(run, rest), above, change)
        return run.select([kept.get(row, range(n)) for row, n in enumerate(run.counts)])


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
        f"positions 0 to {n - 1}",
        below=n,
        empty=True,
        distinct=False,  # in a short prompt a rule may name one twice
    )
    return sorted({*positions, n - 1})
