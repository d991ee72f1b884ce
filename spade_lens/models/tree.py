"""See whether a model has changed since it was taken apart: its modules, hooks, types and settings.

The values of weights are not looked at: what is made of them is kept for one call only. What is
looked at is what a module tree holds, by identity, so that a look costs about a hundredth of a run
of two tokens.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from spade_lens.models.placed import gathered, offloaded, unshard

_PLAIN = (bool, int, float, str, type(None))
_CONTENT = ("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers", "_modules")
_OF_LIBRARIES = ("torch.", "transformers.", "transformer_lens.", "accelerate.")


@dataclass(frozen=True)
class Change:
    """Something in a module tree that is not what it was.

    Args:
        module: The name of the module.
        what: The attribute or entry of it.
        is_hook: Whether it is a hook that was registered or removed.
    """

    module: str
    what: str
    is_hook: bool = False

    def __str__(self) -> str:
        return f"{self.what} of {self.module}"


class ModuleTree:
    """What modules and all modules below them hold, to be compared with what they hold later.

    Args:
        roots: The modules at the top.
        attributes: Look at settings and other attributes too, not only at modules, parameters,
            buffers and hooks. A bridge changes attributes of its own when it runs.
        ignored: Changes that mean nothing, since the model makes them itself when it runs.

    Attributes:
        has_hooks: Whether hooks of a user's own are registered on a module.
    """

    def __init__(
        self, *roots: nn.Module, attributes: bool = True, ignored: Iterable[Change] = ()
    ) -> None:
        named = [
            (name or type(root).__name__, module)
            for root in roots
            for name, module in root.named_modules()
        ]
        self._modules = [module for _, module in named]
        self._names = [name for name, _ in named]
        self._classes = [type(module) for module in self._modules]
        outer = [(name, "", vars(module)) for name, module in named]
        if attributes:
            outer += [("config", "", vars(config)) for config in _configs(self._modules)]
        inner = [
            ("all modules", kind, hooks)
            for kind, hooks in vars(torch_modules).items()
            if kind.startswith("_global_") and isinstance(hooks, dict)
        ]
        for name, _, held in outer:
            known = held.items() if attributes else ((kind, held.get(kind)) for kind in _CONTENT)
            inner += [
                (name, kind, value) for key, one in known for kind, value in _inside(key, one)
            ]
        # Nine of ten are empty, and one ``any`` tells whether they still are.
        self._empty_places = [place for place in inner if not place[-1]]
        self._empty = [held for *_, held in self._empty_places]
        self._places = [place for place in inner if place[-1]] + (outer if attributes else [])
        self._held = [tuple(_values(held)) for *_, held in self._places]
        self._forwards = {kind: kind.forward for kind in self._classes}
        self._tensors = [t for root in roots for t in (*root.parameters(), *root.buffers())]
        self._kinds = [(tensor.dtype, tensor.device, tensor.shape) for tensor in self._tensors]
        self.ignored = frozenset(ignored)
        self.has_hooks = has_hooks(self._modules)

    def changes(self) -> list[Change]:
        """Return what has changed, the changes that mean nothing aside."""
        found = [] if self._is_untouched() else list(self._differences())
        for tensor, before in zip(self._tensors, self._kinds, strict=True):
            now = (tensor.dtype, tensor.device, tensor.shape)
            if now != before:
                was, is_now = (f"{kind} {list(shape)} on {at}" for kind, at, shape in (before, now))
                found.append(Change("the model", f"weights in {was}, now {is_now},"))
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                found.append(Change(f"the class {kind.__name__}", "forward"))
        return [change for change in found if change not in self.ignored]

    def in_training(self) -> str | None:
        """Name a module that gives something else in training mode and is in it; None if none."""
        named = zip(self._names, self._modules, strict=True)
        return next((n for n, m in named if trains(m, self._modules[0])), None)

    def _is_untouched(self) -> bool:
        if any(self._empty) or not all(map(is_, map(type, self._modules), self._classes)):
            return False
        for (*_, held), known in zip(self._places, self._held, strict=True):
            if len(held) != len(known) or not all(map(is_, _values(held), known)):
                return False
        return True

    def _differences(self) -> Iterator[Change]:
        for name, module, kind in zip(self._names, self._modules, self._classes, strict=True):
            if type(module) is not kind:
                yield Change(name, "the class")
        places = [(place, ()) for place in self._empty_places if place[-1]]
        for (name, kind, held), known in [*places, *zip(self._places, self._held, strict=True)]:
            if len(held) != len(known):
                yield Change(name, kind or "the attributes", is_hook="hooks" in kind)
                continue
            named = held.items() if isinstance(held, dict) else enumerate(held)
            for (key, now), before in zip(named, known, strict=True):
                same = isinstance(now, _PLAIN) and type(now) is type(before) and now == before
                if now is not before and not same:
                    yield Change(name, f"{kind}[{key!r}]" if kind else key, "hooks" in kind)


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Return all settings that modules hold, those of a text model inside others too."""
    held = [v for m in modules for k, v in vars(m).items() if k in ("config", "cfg")]
    held += [c.get_text_config() for c in held if hasattr(c, "get_text_config")]
    return list({id(config): config for config in held if hasattr(config, "__dict__")}.values())


def _inside(key: Any, held: Any) -> Iterator[tuple[str, Any]]:
    """Yield dictionaries and lists in an attribute, those inside them too, and what they are."""
    if isinstance(held, dict | list):
        yield str(key), held
        for inner, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _inside(f"{key}[{inner!r}]", value)


def _values(held: Any) -> Iterable[Any]:
    return held.values() if isinstance(held, dict) else held


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks that change what a module gives are registered, other than libraries' own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [getattr(torch_modules, f"_global{kind}") for kind in kinds]
    modules = list(modules)
    hooks += [vars(module)[kind] for module in modules for kind in kinds]
    functions = [function for registered in hooks for function in registered.values()]
    if any(not _module_of(function).startswith(_OF_LIBRARIES) for function in functions):
        return True
    # TransformerLens wraps the hooks of a HookPoint in functions of its own, and lists them.
    return any(getattr(module, "fwd_hooks", None) for module in modules)


def trains(module: nn.Module, model: nn.Module) -> bool:
    """Return whether a module of a model is in training mode, and gives something else there."""
    if not module.training:
        return False
    drops = [v for key, v in vars(module).items() if re.search("drop|noise", key)]
    drops += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    of_batch = isinstance(module, nn.modules.batchnorm._NormBase)
    return module is model or of_batch or any(type(v) is float and v > 0 for v in drops)


def weights_sha256(module: nn.Module) -> str:
    """Return a hash of all parameters and buffers that are saved, and their names."""
    digest, elsewhere = hashlib.sha256(), offloaded(module)
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        tensor = elsewhere[key]() if tensor.is_meta else gathered(tensor)
        data = tensor.detach().cpu().contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    unshard(module)  # which a look at its state has undone
    return digest.hexdigest()


def _module_of(function: Any) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)
