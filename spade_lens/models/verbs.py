"""What a model offers of higher floors, as methods: whoever has a model need not look for more."""

from typing import Any

from spade_lens.lazy import verb
from spade_lens.prompts.inputs import PromptsLike


class Verbs:
    """The verbs that take prompts and a model."""

    def read(self, prompts: PromptsLike, *arguments: Any, **options: Any) -> Any:
        """Read prompts by lenses at every layer: :func:`spade_lens.read` with this model.

        Example:
            >>> model.read("ab->", "logit", layers=2).to_frame()["layer"].tolist()
            [2]
        """
        return verb("read")(prompts, *arguments, model=self, **options)

    def generate(self, prompts: PromptsLike, *arguments: Any, **options: Any) -> Any:
        """Write text after prompts: :func:`spade_lens.generate` with this model.

        Example:
            >>> model.generate("ab", 2).ended
            ('length',)
        """
        return verb("generate")(prompts, *arguments, model=self, **options)
