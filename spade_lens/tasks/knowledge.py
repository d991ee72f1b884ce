"""Knowledge tasks: word pairs whose rule the model may know by heart, as episodes."""

from dataclasses import dataclass
from typing import Any

from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.episodes import Episode
from spade_lens.tasks.word_pairs import WordPairTask


@dataclass(frozen=True)
class KnowledgeTask:
    """Word pairs as a task of experiments: a wrong answer stands beside every right one.

    Example:
        >>> from spade_lens.tasks import task
        >>> episode = KnowledgeTask(task("country-capital")).episodes(1, shots=4)[0]
        >>> episode.foil != episode.answer
        True

    Args:
        pairs: The word pairs.
    """

    pairs: WordPairTask

    @property
    def name(self) -> str:
        """The name of the word pairs."""
        return self.pairs.name

    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        """The samples of the word pairs, each with a foil.

        Ours: the foil is another pair's output, not among those shown, that begins with another
        letter, so that its first token is another one.

        Args:
            n: How many.
            shots: How many demonstrations in each.
            seed: Seed of the drawing, 0 or more.

        Raises:
            ValueError: As :meth:`spade_lens.tasks.WordPairTask.sample` does, and if no output is
                left for a foil.
        """
        sampled = self.pairs.sample(n, shots=shots, seed=seed)
        # More shots extend fewer, so what comes last is shown last, and stays the foil longest.
        rest = self.pairs.sample(n, shots=len(self.pairs.pairs) - 1, seed=seed)
        drawn = []
        for (shown, (query, answer)), (everything, _) in zip(sampled, rest, strict=True):
            taken = {output for _, output in shown}
            left = [output for _, output in reversed(everything[shots:]) if output not in taken]
            free = [output for output in left if _begin_differs(output, answer)]
            if not free:
                raise ValueError(
                    f"Task {self.name!r} has no output left to set beside {answer!r}. Use fewer "
                    "shots or give more pairs."
                )
            drawn.append(
                Episode(
                    task=self.name,
                    demonstrations=shown,
                    query=query,
                    answer=answer,
                    foil=free[0],
                    rule=self.name,
                )
            )
        return drawn

    def prompts(
        self,
        tokenizer: Any,
        n: int,
        *,
        shots: int = 16,
        seed: int = 0,
        template: Template = ARROW,
    ) -> list[Prompt]:
        """The episodes as prompts, with the answer and its foil as candidates.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: How many.
            shots: How many demonstrations.
            seed: Seed of the drawing.
            template: How a line is written.

        Raises:
            ValueError: As :meth:`episodes` and :meth:`spade_lens.tasks.Episode.prompt` do.
        """
        drawn = self.episodes(n, shots=shots, seed=seed)
        return [episode.prompt(tokenizer, template=template) for episode in drawn]


def _begin_differs(one: str, other: str) -> bool:
    # The first byte, since tokens may be bytes.
    return one.casefold().encode()[0] != other.casefold().encode()[0]
