"""Hook names: which fire when a model runs in pieces, and what the functions on them may give."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.models.backbone import Backbone, FwdHooks
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hooks import Batching, hooked, quietness

_SWITCHES = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}
"""Hooks that fire where a setting of TransformerLens is on."""

_PERHAPS_UNHEEDED = ("hook_attn_scores", "hook_pattern", "rotary_emb.hook_in", "pos_embed.hook_in")
"""Hooks that some bridges ask when what they show has been used, or for a dtype alone."""


class HookPoints:
    """The hook points of a model, and which of them fire when it runs in pieces.

    Args:
        plain: The model in pieces, without hooks. Its bridge is known to be the model.
        name: What messages call the model.

    Attributes:
        backbone: The pieces in which hooks fire. They run a few tokens, to see which do.

    Raises:
        UnsupportedModelError: If hooks cannot act on the model.
    """

    def __init__(self, plain: Backbone, name: str) -> None:
        self._name = name
        with bridging(name):
            backbone, self._host = plain.hookable()
            self._switches = _switches(self._host)
            self._points: dict[str, Any] = dict(self._host.hook_dict)
            shapes: dict[int, tuple[int, ...]] = {}

            def see(point: Any, out: Any) -> None:
                shapes[id(point)] = tuple(getattr(out, "shape", (1,)))

            plain_logits = _logits(backbone, self._points.values(), see)
        self.backbone = hooked(backbone)
        self.names = {n: point.name for n, point in self._points.items() if id(point) in shapes}
        self._read_only: set[str] = set()
        for kind in _PERHAPS_UNHEEDED:
            alike = {n for n in self.names if n.endswith(kind)}
            if alike and torch.equal(self._logits_changed_at(alike, backbone), plain_logits):
                self._read_only |= alike
        # Some models put the tokens of all rows in one line, where no hook can tell rows apart.
        self._flat = {n for n in self.names if shapes[id(self._points[n])][0] not in (1, 2)}

    def _logits_changed_at(self, names: Iterable[str], backbone: Backbone) -> Tensor:
        points = {self._points[name] for name in names}

        def change(point: Any, out: Any) -> Any:
            # Ids and positions stay in range; attention goes to other places.
            return out.flip(-1) if point in points and isinstance(out, Tensor) else None

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the change is discarded
            return _logits(backbone, self._points.values(), change)

    @property
    def hold(self) -> bool:
        """Whether the same ones still fire: TransformerLens has switches for some."""
        return self._switches == _switches(self._host)

    @contextmanager
    def open(
        self, fwd_hooks: FwdHooks, outer: Batching, *, ragged: bool
    ) -> Iterator[tuple[Batching, list[str]]]:
        """Let hooks fire; yield what they and those around them allow, and where they act.

        Args:
            fwd_hooks: The hooks; see :meth:`checked`.
            outer: What the hooks around these allow.
            ragged: Whether these heed the mask.
        """
        hooks = self.checked(fwd_hooks)
        alone = any(name in self._flat for name, _ in hooks)
        own: Batching = "any lengths" if ragged else "one prompt" if alone else "equal lengths"
        with self._host.hooks(fwd_hooks=hooks):
            places = [self.names[name] for name, _ in hooks]
            yield max(outer, own, key=get_args(Batching).index), places

    def checked(self, fwd_hooks: FwdHooks) -> list[tuple[str, Callable[..., Any]]]:
        """Return pairs of a name that fires and a function that is checked when it acts.

        Raises:
            TypeError: If something else than pairs of name (or filter) and function is given.
            ValueError: If a name or filter names nothing that fires.
        """
        pairs = pairs_of(fwd_hooks)
        checked = []
        for given, function in pairs:
            if isinstance(given, str):
                if given not in self.names:
                    raise ValueError(self._refusal(given))
                names = [given]
            else:
                # Of the names of one hook point, the first.
                matching = {self.names[n]: n for n in reversed(self.names) if given(n)}
                names = list(reversed(matching.values()))
                if not names:
                    raise ValueError(
                        f"The filter {given!r} matches no hook name of {self._name} that fires. "
                        f"There are for example {', '.join(map(repr, list(self.names)[-3:]))}."
                    )
            checked += [
                (n, _acting(function, n, self._name, read_only=n in self._read_only)) for n in names
            ]
        return checked

    def _refusal(self, given: str) -> str:
        near = get_close_matches(given, self.names, n=4, cutoff=0.4)
        nearest = f" Nearest: {', '.join(map(repr, near))}." if near else ""
        if given not in self._points:
            return f"The hook name {given!r} was given; {self._name} has none such.{nearest}"
        why, switch = "nothing in this model passes it", _SWITCHES.get(given.rpartition(".")[2])
        if switch is not None and not getattr(self._host.cfg, switch, False):
            whose = "original" if self.backbone.bridge() is None else "bridge"
            why = (
                f"TransformerLens has it switched off; model.{whose}.set_{switch}(True) turns it on"
            )
        return f"The hook name {given!r} was given. It never fires in {self._name}: {why}.{nearest}"


def _switches(host: Any) -> tuple[Any, ...]:
    return tuple(getattr(host.cfg, switch, None) for switch in _SWITCHES.values())


@torch.no_grad()
def _logits(
    backbone: Backbone, points: Iterable[Any], act: Callable[[Any, Any], Any]
) -> Float[Tensor, "row d_vocab"]:
    """Run three tokens of two rows with one function at some hook points, and no other hooks."""
    hooks = {point: dict(point._forward_hooks) for point in points}
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]], device=backbone.device)
    positions = torch.arange(3, device=backbone.device).expand_as(tokens)
    try:
        for point in hooks:
            # Emptied in place: a copy of the model may share the dictionary, and be what runs.
            point._forward_hooks.clear()
            point.register_forward_hook(lambda _m, _a, out, point=point: act(point, out))
        resid = backbone.embed(tokens, positions)
        resid = backbone.run_blocks(resid, positions, 0, backbone.n_layers)
        return backbone.unembed(backbone.final_norm(resid[:, -1]))
    finally:
        for point, own in hooks.items():
            point._forward_hooks.clear()
            point._forward_hooks.update(own)


@contextmanager
def bridging(name: str) -> Iterator[None]:
    """Refuse a model that TransformerLens' own form of it is not, for whatever reason."""
    try:
        yield
    except Exception as error:
        raise UnsupportedModelError(
            f"Hooks cannot act on {name} and it has no bridge, but all else works: "
            f"TransformerLens' own form of it is not the model ({type(error).__name__}: {error})."
        ) from error


def pairs_of(fwd_hooks: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Return hooks as pairs of a name (or filter) and a function of two arguments.

    Raises:
        TypeError: If something else is given.
    """
    advice = "expected pairs such as [('blocks.3.attn.hook_pattern', function)]"
    if isinstance(fwd_hooks, str) or not isinstance(fwd_hooks, Iterable):
        raise TypeError(f"fwd_hooks={fwd_hooks!r} was given; {advice}.")
    pairs = list(fwd_hooks)
    for pair in pairs:
        if not (isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2):
            raise TypeError(f"{pair!r} was given as a hook; {advice}.")
        if not (isinstance(pair[0], str) or callable(pair[0])) or not callable(pair[1]):
            raise TypeError(f"{tuple(pair)!r} was given as a hook; {advice}, or a filter on names.")
        if not _takes_a_hook(pair[1]):
            raise TypeError(
                f"The function {pair[1]!r} was given as a hook on {pair[0]!r}; expected one of two "
                "arguments, the tensor and the hook point, the second of which is called 'hook': "
                "def scale(tensor, hook): return 2 * tensor."
            )
    return [(given, function) for given, function in pairs]


def _takes_a_hook(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, hook=None)
    except TypeError:
        return False
    except ValueError:  # written in C, and tells nothing
        return True
    return True


def _acting(
    function: Callable[..., Any], name: str, model: str, *, read_only: bool
) -> Callable[..., Any]:
    """Return a hook that is silent where it should be, and may not change what it cannot."""
    depth = quietness()

    def act(activation: Any, hook: Any) -> Any:
        if quietness() > depth:
            return None
        before = activation.clone() if read_only else activation
        given = function(activation, hook=hook)
        if read_only and not _equal(activation if given is None else given, before):
            raise UnsupportedModelError(
                f"The hook on {name!r} of {model} changed the activation, which is read only: it "
                "has been used when the hook fires, so the change would have no effect. Change "
                "another, such as attn.hook_z or attn.hook_out in a block."
            )
        if given is None or not isinstance(activation, Tensor):
            return given
        made, expected = (
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__
            for x in (given, activation)
        )
        if made != expected:
            raise ValueError(
                f"The hook on {name!r} of {model} gave {made}; expected {expected}, the shape and "
                "dtype of the activation, or None to leave it (as it is after any write in place)."
            )
        return given

    return act


def _equal(given: Any, before: Tensor) -> bool:
    # A pattern may hold NaN where a row attends to nothing.
    return given is before or (
        isinstance(given, Tensor)
        and given.shape == before.shape
        and torch.equal(given.nan_to_num(), before.nan_to_num())
    )
