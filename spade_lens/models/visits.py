"""Look at the model when a user's call begins, and keep what is made of it until the call ends.

A model may change between two calls: modules, hooks, types, settings. That is seen here, and the
model is taken apart and checked anew, or refused. The values of weights may change without a trace,
so nothing that is made of them outlives a call.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

import torch

from spade_lens.checks import plain_name
from spade_lens.models.backbone import Backbone, FwdHooks, Prefix
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hook_points import HookPoints, bridging, pairs_of
from spade_lens.models.hooks import Batching, hooked
from spade_lens.models.tree import ModuleTree, has_hooks
from spade_lens.settings import one_call
from spade_lens.storage.content import content_sha256

_MANY_ROWS = 16
"""From here on it pays to run the start token alone, once: it costs as much as any first row."""

_START_TOKENS = 8
"""How many start tokens' keys and values are kept at once: 1.5 MB each in a model of 7B."""


@dataclass
class Visit:
    """What is known of a model for the length of one call.

    Args:
        backbone: The adapter around the model as it is.
        hooked: Whether hooks may act.
        batching: Which prompts may run side by side.
        n_rows: How many rows the call is known to run.
        sha256: The hash of the weights, once it has been asked for.
    """

    backbone: Backbone
    hooked: bool
    batching: Batching
    n_rows: int = 0
    sha256: str | None = None
    _prefixes: OrderedDict[int, Prefix | None] = field(default_factory=OrderedDict)
    _decoders: dict[bool, Backbone | None] = field(default_factory=dict)

    def expect_rows(self, n: int) -> None:
        """Say how many rows the call will run."""
        self.n_rows = max(self.n_rows, n)

    def decoder(self, *, packed: bool) -> Backbone | None:
        """Return the pieces for decoding with a cache; None where hooks may act."""
        if self.hooked:
            return None
        if packed not in self._decoders:
            with torch.no_grad():
                self._decoders[packed] = self.backbone.for_few_rows(packed=packed)
        return self._decoders[packed]

    def prefix(self, token: int) -> Prefix | None:
        """Return keys, values and residuals of a start token, if they can and will be reused."""
        if self.hooked or self.n_rows < _MANY_ROWS:
            return None
        if token not in self._prefixes:
            with torch.no_grad():
                self._prefixes[token] = self.backbone.prefix(token)
            if len(self._prefixes) > _START_TOKENS:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(token)
        return self._prefixes[token]


@dataclass(frozen=True, eq=False)
class _Hooking:
    """The hooks that are open: whose they are, what they run on, and the modules with them."""

    owner: object
    name: str | None
    places: tuple[str, ...]
    content: str | None
    backbone: Backbone
    batching: Batching
    trees: tuple[ModuleTree, ...]


class Visits:
    """The model as it is at every call. One thread at a time has it.

    Args:
        take_apart: Returns the adapter around the model as it is now.
        check: Raises if the pieces are not the model.
        name: What messages call the model.

    Attributes:
        backbone: The adapter as of the last call, without hooks.
    """

    backbone: Backbone

    def __init__(
        self, take_apart: Callable[[], Backbone], *, check: Callable[[Backbone], None], name: str
    ) -> None:
        self._take_apart = take_apart
        self._check = check
        self._name = name
        self._lock = RLock()
        self._open: tuple[_Hooking, ...] = ()
        self._twin: ModuleTree | None = None
        self._points: HookPoints | None = None
        self._renew()

    @property
    def _hooking(self) -> _Hooking | None:
        return self._open[-1] if self._open else None

    @property
    def hook_name(self) -> str | None:
        """What the open hooks are called."""
        return None if self._hooking is None else self._hooking.name

    @property
    def hook_places(self) -> tuple[str, ...]:
        """Where the open hooks act, in the order in which they were given."""
        return () if self._hooking is None else self._hooking.places

    @property
    def hook_content(self) -> str | None:
        """A hash of what the functions of the open hooks do; None where they have no name."""
        return None if self._hooking is None else self._hooking.content

    @one_call()
    def bridge(self) -> Any:
        """Return the ``TransformerBridge`` over the model's weights; None where there is none.

        Raises:
            RuntimeError: If it is not made yet and modules have hooks of their own.
            UnsupportedModelError: If it is not the model, as the check of its pieces shows.
        """
        if self._twin is not None and not self._tree.changes():
            # Also where reading refuses it: what it was given is taken off through it.
            return self.backbone.twin
        self.now()
        if self._twin is None:
            self._refuse_hooks_beside()
            with bridging(self._name):
                pieces, _ = self.backbone.hookable()
                if pieces is not self.backbone:
                    self._check(hooked(pieces))
            if self.backbone.twin is not None:
                self._twin = ModuleTree(self.backbone.twin, attributes=False)
        return self.backbone.bridge()

    def now(self) -> Visit:
        """Return what is known of the model in this call, with a look at it if the call is new.

        Raises:
            RuntimeError: If the model has changed in a way that cannot be served.
            UnsupportedModelError: If the model as it is now cannot be taken apart.
        """
        with one_call() as call:
            key = (self, self._hooking)
            if key not in call.kept:
                self._lock.acquire()
                call.at_end.callback(self._lock.release)
                _refuse_autocast(self._name)
                hooking = self._hooking
                if hooking is None:
                    self._look()
                    visit = Visit(self.backbone, False, "any lengths")
                    if self._tree.has_hooks:
                        visit = Visit(hooked(self.backbone), True, "equal lengths")
                else:
                    self._look_inside(hooking)
                    visit = Visit(hooking.backbone, True, hooking.batching)
                for backbone in {self.backbone, getattr(visit.backbone, "inner", visit.backbone)}:
                    backbone.refresh()
                call.kept[self, hooking] = visit
                return visit
            known: Visit = call.kept[key]
            return known

    @one_call()
    def points(self) -> HookPoints:
        """Return the hook points of the model as it is.

        Raises:
            UnsupportedModelError: If hooks cannot act on it.
        """
        self.now()
        if self._points is None or not self._points.hold:
            self.bridge()
            self._points = HookPoints(self.backbone, self._name)
        return self._points

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks, name: str | None, *, ragged: bool) -> Iterator[None]:
        """Open a context in which TransformerLens hooks fire; see ``Model.hooks``."""
        if name is not None and not plain_name(name, "hooks").strip():
            raise ValueError(f"name={name!r} was given for hooks; expected some text, or None.")
        with ExitStack() as stack:
            with one_call():
                visit, points = self.now(), self.points()
                outer = self._hooking
                if outer is None:
                    self._refuse_hooks_beside()
                pairs = pairs_of(fwd_hooks)
                opened = points.open(pairs, visit.batching, ragged=ragged)
                batching, places = stack.enter_context(opened)
                if outer is not None:
                    name = None if None in (outer.name, name) else f"{outer.name} + {name}"
                    places = [*outer.places, *places]
                # A bridge changes attributes of its own when it runs, and a copy has others.
                trees = (
                    ModuleTree(*self.backbone.roots, ignored=self._tree.ignored),
                    ModuleTree(*points.backbone.roots, attributes=False),
                )
                functions = [None if outer is None else outer.content, *(f for _, f in pairs)]
                content = None if name is None else content_sha256(functions)
                about = name, tuple(places), content
                own = _Hooking(_owner(), *about, points.backbone, batching, trees)
                self._open = (*self._open, own)
            try:
                yield
            finally:
                # Not amid another thread's call. Generators may close out of turn: the hooks that
                # stay open then see a change, and refuse.
                with self._lock:
                    self._open = tuple(one for one in self._open if one is not own)
                    stack.close()

    def _renew(self) -> None:
        _refuse_autocast(self._name)
        backbone = self._take_apart()
        before = ModuleTree(*backbone.roots)
        self._check(backbone)
        self._tried_with_hooks = before.has_hooks
        self.backbone, self._twin, self._points = backbone, None, None
        self._tree = ModuleTree(*backbone.roots, ignored=before.changes())

    def _look(self) -> None:
        """See or refuse what has changed since the last call."""
        changes = self._tree.changes()
        if changes and (module := self._tree.in_training()) is not None:
            raise RuntimeError(
                f"{self._name} is in training mode since it was loaded ({module}), and dropout may "
                "be on. Call .eval() on it before it is read."
            )
        of_hooks = all(c.is_hook for c in changes) and not has_hooks(self.backbone.bypassed)
        if changes and of_hooks and not self._tried_with_hooks:
            # The pieces are what they were, and a check would only fire the hooks. It is not so
            # where hooks were there when windows were measured.
            self._tree = ModuleTree(*self.backbone.roots, ignored=self._tree.ignored)
        elif changes:
            try:
                self._renew()
            except UnsupportedModelError:
                raise
            except Exception as error:  # the model's own code runs, so any error may come
                raise UnsupportedModelError(
                    f"{self._name} was changed since it was loaded ({changes[0]}), and as it is "
                    f"now it cannot be taken apart: {type(error).__name__}: {error}."
                ) from error
        changes = [] if self._twin is None else self._twin.changes()
        if changes and self.backbone.twin is not None:
            twin = ModuleTree(self.backbone.twin, attributes=False)
            # A bridge leaves hooks of its own where run_with_cache has passed.
            if twin.has_hooks or not all(c.is_hook for c in changes):
                raise RuntimeError(
                    f"{self._name}.bridge was changed ({changes[0]}). It is a view that reading "
                    "does not pass through. Use model.hooks(...) for hooks, change model.original, "
                    "or load() the bridge as a model of its own."
                )
            self._twin = twin

    def _refuse_hooks_beside(self) -> None:
        """Raise if hooks are on the user's modules and would not be on a bridge over them."""
        runs_itself = any(hasattr(root, "hook_dict") for root in self.backbone.roots)
        if self._tree.has_hooks and not runs_itself:
            raise RuntimeError(
                f"Hooks are registered on modules of {self._name}, and the bridge, which "
                "model.hooks() runs, does not have them. Remove one or the other."
            )

    def _look_inside(self, hooking: _Hooking) -> None:
        """Refuse another thread or task, and changes that were made while hooks are open."""
        if hooking.owner != _owner():
            raise RuntimeError(
                f"Another thread or asyncio task is inside {self._name}.hooks(...), and hooks act "
                "in one alone. Open them here after that, or load() the same Hugging Face model "
                "once for each, which shares its weights."
            )
        changes = [change for tree in hooking.trees for change in tree.changes()]
        if changes:
            raise RuntimeError(
                f"{self._name} was changed inside model.hooks(...): {changes[0]}. Leave the "
                "context, and enter it again after the change."
            )


def _refuse_autocast(name: str) -> None:
    """Raise where torch rounds numbers on its own: nothing would be in the dtype that is told."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise UnsupportedModelError(
                f"{name} was called inside torch.autocast({device!r}), which rounds to "
                f"{torch.get_autocast_dtype(device)} in places of its choice. Leave it, or load "
                "the model in that dtype."
            )


def _owner() -> tuple[int, object]:
    """Return the thread that runs and, in one that runs several asyncio tasks, the task."""
    try:
        return get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop
        return get_ident(), None
