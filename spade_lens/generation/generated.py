"""What was written: texts, tokens, log-probabilities, and what was drafted for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import visible
from spade_lens.generation.marked import Marked, page
from spade_lens.generation.steering import Steering
from spade_lens.generation.stops import Stops
from spade_lens.generation.strategy import Round
from spade_lens.lazy import verb
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.files import as_path
from spade_lens.storage.records import load_record, save_record

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 3
_SHOWN_IN_NOTEBOOKS = 10


@dataclass
class Written:
    """One text while it is written."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)
    layers: list[int | None] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    prompt_layer: int | None = None
    text: str = ""
    ended: str = ""

    def take(self, new: Round, stops: Stops, left: int) -> int:
        """Add the tokens of a round up to where the text ends; return how many."""
        if new.prompt_layer is not None:
            self.prompt_layer = new.prompt_layer
        for n, token in enumerate(new.tokens):
            self.tokens.append(token)
            self.logprobs.append(new.logprobs[n])
            self.accepted.append(n < new.accepted)
            self.layers.append(new.layer)
            self.greedy += new.greedy[n : n + 1]
            self.ended = stops.ends(self.tokens) or ("length" if n + 1 == left else "")
            if self.ended:
                break
        taken = n + 1
        self.rounds.append((new.drafted, min(new.accepted, taken)))
        if self.ended:
            self.text = stops.cut(stops.text(self.tokens))
        return taken


@dataclass(frozen=True, repr=False, eq=False)
class Generated:
    """Texts after prompts.

    Args:
        model: The model's name.
        strategy: How tokens were made.
        prompts: The texts of the prompts.
        texts: The new text of every prompt, without its stop and without special tokens.
        ended: What ended every text: ``length``, ``stop token`` or ``stop string``.
        words: The text of every token id that occurs.
        prompt: The prompt of every new token.
        token: The new tokens, prompt by prompt; the one that ended a text is the last.
        logprob: Their log-probabilities, in nats, under the model without warping.
        accepted: Whether a token was drafted and accepted.
        rounds: Every round: its prompt, how many tokens were drafted, how many were accepted.
        residuals: The layers that were asked for, where new tokens were read; None for none.
        exit_layer: The layer that every new token was read at; None where all were read at the
            last.
        greedy: The likeliest token in the place of every new one, where a search could take
            another; None for other strategies.
        prompt_exit_layer: The layer that every prompt left at; None where no rule decided it.
    """

    model: str
    strategy: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ended: tuple[str, ...]
    words: dict[int, str]
    prompt: Int[Tensor, " new"]
    token: Int[Tensor, " new"]
    logprob: Float[Tensor, " new"]
    accepted: Bool[Tensor, " new"]
    rounds: Int[Tensor, "round 3"]
    residuals: Residuals | None = field(default=None, compare=False)
    exit_layer: Int[Tensor, " new"] | None = None
    greedy: Int[Tensor, " new"] | None = None
    prompt_exit_layer: Int[Tensor, " text"] | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        strategy: str,
        prompts: Sequence[Prompt],
        written: Sequence[Written],
        steering: Steering,
    ) -> "Generated":
        """Make it of the texts that were written."""
        each = [len(text.tokens) for text in written]
        token = [token for text in written for token in text.tokens]
        greedy = [token for text in written for token in text.greedy]
        rounds = [(i, *r) for i, text in enumerate(written) for r in text.rounds]
        whole = [[*p.tokens, *text.tokens] for p, text in zip(prompts, written, strict=True)]
        return cls(
            model=model.name,
            strategy=strategy,
            prompts=tuple(prompt.text for prompt in prompts),
            texts=tuple(text.text for text in written),
            ended=tuple(text.ended for text in written),
            words={t: model.word(t) for t in sorted({*token, *greedy})},
            prompt=torch.arange(len(prompts)).repeat_interleave(torch.tensor(each)),
            token=torch.tensor(token),
            logprob=torch.tensor([x for text in written for x in text.logprobs]),
            accepted=torch.tensor([x for text in written for x in text.accepted]),
            rounds=torch.tensor(rounds),
            residuals=steering.residuals(model, whole),
            exit_layer=_exit_layers(model, [at for text in written for at in text.layers]),
            greedy=torch.tensor(greedy) if greedy else None,
            prompt_exit_layer=_prompt_layers([text.prompt_layer for text in written]),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        n = len(self)
        return visible(
            f"Generated({n} text{'s' * (n != 1)} of {self.model}, {len(self.token)} tokens, "
            f"{self.strategy})"
        )

    def __str__(self) -> str:
        shown = [f"{p}\u2192{t}" for p, t in zip(self.prompts, self.texts, strict=True)]
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return visible("\n\n".join([*shown[:_SHOWN], *more]))

    def _repr_html_(self) -> str:
        drafted, accepted = self.rounds[:, 1:].sum(dim=0).tolist()
        counted = f"; marked: accepted drafts, {accepted} of {drafted}" if drafted else ""
        columns = (self.token, self.logprob, self.accepted)
        shown = zip(self.prompts, self.texts, *map(self._by_prompt, columns), strict=True)
        texts = [
            Marked(prompt, text, [self.words[t] for t in tokens], logprobs, flags)
            for prompt, text, tokens, logprobs, flags in islice(shown, _SHOWN_IN_NOTEBOOKS)
        ]
        caption = f"{self.model}, {len(self.token)} tokens, {self.strategy}{counted}"
        return page(caption, texts, len(self) - len(texts))

    def plot(self, **options: Any) -> Any:
        """Draw log-probabilities by step, accepted drafts marked; see :func:`spade_lens.plot`."""
        return verb("plot")(self, **options)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """The new tokens of every prompt."""
        return tuple(map(tuple, self._by_prompt(self.token)))

    def _by_prompt(self, column: Tensor) -> list[list[Any]]:
        """Return a value of every new token, prompt by prompt."""
        counts = torch.bincount(self.prompt, minlength=len(self)).tolist()
        return [part.tolist() for part in column.split(counts)]

    @property
    def acceptance(self) -> float:
        """Accepted drafts over drafts, as LayerSkip counts; NaN where nothing was drafted."""
        return float(self.rounds[:, 2].sum() / self.rounds[:, 1].sum())

    @property
    def tokens_per_round(self) -> float:
        """New tokens a round, the model's own among them: Kangaroo's compression rate."""
        return len(self.token) / len(self.rounds)

    def to_frame(self) -> "pd.DataFrame":
        """Make a table with one row for every new token.

        Example:
            >>> sl.generate("ab", 2, model=model).to_frame()["step"].tolist()
            [0, 1]

        Returns:
            Columns ``model``, ``strategy``, ``prompt``, ``step`` (from 0), ``token``,
            ``token_id``, ``logprob`` and ``accepted``; ``exit_layer`` where tokens left early;
            ``prompt_exit_layer`` where prompts left by a rule; ``greedy_token`` and
            ``greedy_token_id`` where a search chose.
        """
        import pandas as pd

        steps = [step for tokens in self.tokens for step in range(len(tokens))]
        more: dict[str, Any] = {}
        if self.exit_layer is not None:
            more["exit_layer"] = self.exit_layer.numpy()
        if self.prompt_exit_layer is not None:
            more["prompt_exit_layer"] = self.prompt_exit_layer[self.prompt].numpy()
        if self.greedy is not None:
            more["greedy_token"] = [self.words[t] for t in self.greedy.tolist()]
            more["greedy_token_id"] = self.greedy.numpy()
        return pd.DataFrame(
            {
                "model": self.model,
                "strategy": self.strategy,
                "prompt": self.prompt.numpy(),
                "step": steps,
                "token": [self.words[t] for t in self.token.tolist()],
                "token_id": self.token.numpy(),
                "logprob": self.logprob.numpy(),
                "accepted": self.accepted.numpy(),
            }
            | more
        )

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``generated.safetensors`` and ``generated.json``; return the folder.

        Residuals go to files of their own beside them.
        """
        if self.residuals is not None:
            self.residuals.save(folder)
        return save_record(replace(self, residuals=None), folder, kind="generated")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Generated":
        """Return the texts that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the files are damaged or describe something else.
        """
        loaded = load_record(cls, folder, kind="generated")
        if (as_path(folder) / "residuals.safetensors").exists():
            return replace(loaded, residuals=Residuals.load(folder))
        return loaded


def _exit_layers(model: Model, layers: Sequence[int | None]) -> Tensor | None:
    """Return the layers that tokens were read at; None if all were read at the last."""
    if all(layer is None for layer in layers):
        return None
    return torch.tensor([model.n_layers if layer is None else layer for layer in layers])


def _prompt_layers(layers: Sequence[int | None]) -> Tensor | None:
    """Return the layers that prompts left at; None if no rule decided them."""
    known = [layer for layer in layers if layer is not None]
    return torch.tensor(known) if len(known) == len(layers) else None
