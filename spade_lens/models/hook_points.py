"""Hook names: which fire when a model runs in pieces, and what the functions on them may give."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_args

import torch
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

_AFTER_THE_FACT = "_fire_post_hoc_hook"
"""What TransformerLens runs a hook by where the value has already been used."""


class HookPoints:
    """The hook points of a model, and which of them fire when it runs in pieces.

    Args:
        plain: The model in pieces, without hooks.
        check: Raises if other pieces are not the model.
        name: What messages call the model.

    Attributes:
        backbone: The pieces in which hooks fire. They run a few tokens, to see which do.

    Raises:
        UnsupportedModelError: If hooks cannot act on the model.
    """

    def __init__(self, plain: Backbone, check: Callable[[Backbone], None], name: str) -> None:
        self._name = name
        try:
            backbone, self._host = plain.hookable()
            self._switches = _switches(self._host)
            self._points: dict[str, Any] = dict(self._host.hook_dict)
            shapes, late = _fired(backbone, self._points.values())
            self.backbone = hooked(backbone)
            if backbone is not plain:
                check(self.backbone)
        except Exception as error:
            raise UnsupportedModelError(
                f"Hooks cannot act on {name}, but all else works: TransformerLens' own form of it "
                f"is not the model ({type(error).__name__}: {error})."
            ) from error
        self.names = {n: point.name for n, point in self._points.items() if id(point) in shapes}
        # Some models put the tokens of all rows in one line, where no hook can tell rows apart.
        self._read_only = {n for n in self.names if id(self._points[n]) in late}
        self._flat = {n for n in self.names if shapes[id(self._points[n])][0] not in (1, 2)}

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
        pairs = _pairs(fwd_hooks)
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
def _fired(
    backbone: Backbone, points: Iterable[Any]
) -> tuple[dict[int, tuple[int, ...]], set[int]]:
    """Run three tokens of two rows; return by id which hook points fire, and with what shape.

    And which of them fire when what they show has been used already.
    """
    fired: dict[int, tuple[int, ...]] = {}
    late: set[int] = set()

    def note(i: int, out: Any) -> None:
        fired[i] = tuple(getattr(out, "shape", (1,)))
        frames = (frame.f_code.co_name for frame, _ in traceback.walk_stack(None))
        # The input of a rotary embedding tells it a dtype, and a 4-D input of positions is a mask.
        if _AFTER_THE_FACT in frames or i in unread or (i in positional and len(fired[i]) == 4):
            late.add(i)

    by_id = {id(point): point for point in points}
    unread, positional = (
        {i for i, point in by_id.items() if point.name == f"{module}.hook_in"}
        for module in ("rotary_emb", "pos_embed")
    )
    hooks = {i: dict(point._forward_hooks) for i, point in by_id.items()}
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]], device=backbone.device)
    positions = torch.arange(3, device=backbone.device).expand_as(tokens)
    try:
        for i, point in by_id.items():
            # Emptied in place: a copy of the model may share the dictionary.
            point._forward_hooks.clear()
            point.register_forward_hook(lambda _m, _a, out, i=i: note(i, out))
        resid = backbone.embed(tokens, positions)
        resid = backbone.run_blocks(resid, positions, 0, backbone.n_layers)
        backbone.unembed(backbone.final_norm(resid[:, -1]))
    finally:
        for i, point in by_id.items():
            point._forward_hooks.clear()
            point._forward_hooks.update(hooks[i])
    return fired, late


def _pairs(fwd_hooks: Any) -> list[tuple[Any, Callable[..., Any]]]:
    advice = "expected pairs such as [('blocks.3.attn.hook_pattern', function)]"
    if isinstance(fwd_hooks, str) or not isinstance(fwd_hooks, Iterable):
        raise TypeError(f"fwd_hooks={fwd_hooks!r} was given; {advice}.")
    pairs = list(fwd_hooks)
    for pair in pairs:
        if not (isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2):
            raise TypeError(f"{pair!r} was given as a hook; {advice}.")
        if not (isinstance(pair[0], str) or callable(pair[0])) or not callable(pair[1]):
            raise TypeError(f"{tuple(pair)!r} was given as a hook; {advice}, or a filter on names.")
    return [(given, function) for given, function in pairs]


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
