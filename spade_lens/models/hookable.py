"""What a model knows of hooks: their names, how to open them, and what runs while they fire."""

from collections.abc import Iterator
from contextlib import contextmanager

from spade_lens.models.backbone import FwdHooks
from spade_lens.models.hooks import Batching, HookRun, running
from spade_lens.models.visits import Visits


class Hookable:
    """A model on which hooks may act."""

    _visits: Visits

    @property
    def hooked(self) -> bool:
        """Whether hooks may act: inside :meth:`hooks`, or registered on a module by the user."""
        return self._visits.now().hooked

    @property
    def hook_name(self) -> str | None:
        """The name of the hooks that act; None if they have none, and for no hooks."""
        return self._visits.hook_name

    @property
    def hook_places(self) -> tuple[str, ...]:
        """The names of the hook points on which :meth:`hooks` that are open act."""
        return self._visits.hook_places

    @property
    def hook_content(self) -> str | None:
        """A hash of what the functions of named hooks do: their code and the values they use."""
        return self._visits.hook_content

    @property
    def batching(self) -> Batching:
        """Which prompts may run side by side: those of any lengths, unless hooks act."""
        return self._visits.now().batching

    @property
    def running(self) -> HookRun | None:
        """What runs, for a hook to read while it fires; None at other times."""
        return running()

    @property
    def hook_names(self) -> dict[str, str]:
        """The names that :meth:`hooks` takes, each with the one that ``hook.name`` gives.

        Example:
            >>> model.hook_names["blocks.3.attn.hook_z"]
            'blocks.3.attn.o.hook_in'

        Raises:
            UnsupportedModelError: If hooks cannot act on this model.
        """
        return dict(self._visits.points().names)

    @contextmanager
    def hooks(
        self, fwd_hooks: FwdHooks, *, name: str | None = None, ragged: bool = False
    ) -> Iterator[None]:
        """Open a context in which TransformerLens hooks fire in all other operations.

        A hook acts on several prompts as on each alone: the rows of a batch are prompts in the
        order given, of equal length. ``model.running`` tells a hook what runs
        (:class:`spade_lens.models.HookRun`).

        Example:
            >>> seen = []
            >>> hooks = [("blocks.3.attn.hook_pattern", lambda pattern, hook: seen.append(pattern))]
            >>> with model.hooks(hooks):  # doctest: +SKIP
            ...     residuals = capture(model, prompts)

        Args:
            fwd_hooks: Pairs of a TransformerLens hook name (or filter) and a function of
                ``(activation, hook)``; a tensor it returns replaces the activation.
            name: What these hooks do. Folders of results are used only where hooks have a name.
                The name, the hook points and the functions decide which: their code and the values
                that they use, as they are when the hooks open.
            ragged: Whether all these hooks heed ``model.running.mask``. Then prompts of unequal
                lengths run side by side, padded after their ends, which is faster.

        Raises:
            TypeError: If something else than pairs of a name and a function of
                ``(activation, hook)`` is given.
            ValueError: If a name or filter names nothing that fires, or ``name`` is empty.
            UnsupportedModelError: If hooks cannot act on this model.
            RuntimeError: If another thread is inside, or modules have hooks of your own.
        """
        with self._visits.hooks(fwd_hooks, name, ragged=ragged):
            yield
