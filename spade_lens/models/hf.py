"""A Hugging Face causal language model, taken apart without knowing its architecture.

TransformerLens' architecture adapters say which module is the list of blocks and which is the final
norm. The model's own code says how a block is called (rotary tables, one or two masks, names of
arguments). To find out, we keep a *spine*: a shallow copy of the modules on the way to the blocks,
in which a recorder replaces every block. Running the spine embeds the tokens and records the
arguments of every block. Then we call the real blocks with these arguments, on any residuals. The
blocks are those of the user's model, which is never changed.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from spade_lens.models.adapters import adapter_for, bridge_over
from spade_lens.models.backbone import (
    AfterBlock,
    Cache,
    CachedTokens,
    KeysValues,
    KeyValueCache,
    Prefix,
)
from spade_lens.models.cache import BlockCache, KeysMade, KeysOnly
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.few_rows import fast_copy
from spade_lens.models.masks import causal_mask
from spade_lens.models.placed import class_of, home_of, let_go, unshard
from spade_lens.models.recorder import (
    Call,
    Recorder,
    Slot,
    shallow_copy,
    tree_copy,
    with_submodule,
    without_hooks,
)
from spade_lens.models.refusals import refuse_idle
from spade_lens.models.spine import Passage, blocks_return_tuples
from spade_lens.models.windows import (
    longest_prompt,
    mask_length,
    named_windows,
    own_window,
    window_of,
)

_FAR = 64
"""A position, for looking at single tokens."""


class HuggingFaceBackbone:
    """The five operations on a Hugging Face ``*ForCausalLM``.

    Args:
        hf_model: The model, in evaluation mode. It is never changed.
        tokenizer: Its tokenizer, for the bridge.
        wrapped_by: The ``TransformerBridge`` that already wraps ``hf_model``, if one does.

    Raises:
        UnsupportedModelError: If the architecture has no adapter, or has blocks that mix tokens
            in another way than causal (sliding-window) attention.
    """

    def __init__(self, hf_model: Any, *, tokenizer: Any = None, wrapped_by: Any = None) -> None:
        self.hf_model = hf_model
        self._tokenizer = tokenizer
        self._wrapped_by = wrapped_by
        config = hf_model.config.get_text_config()
        self.dtype, self.device = next(hf_model.parameters()).dtype, home_of(hf_model)
        adapter = adapter_for(hf_model) if wrapped_by is None else wrapped_by.adapter
        mapping = adapter.get_component_mapping()
        if "blocks" not in mapping:
            raise UnsupportedModelError(
                f"{type(hf_model).__name__} has no single stack of blocks that ends in an "
                "unembedding (TransformerLens lists: " + ", ".join(mapping) + ")."
            )
        self._blocks: list[nn.Module] = list(hf_model.get_submodule(mapping["blocks"].name))
        self._norm = (
            hf_model.get_submodule(mapping["ln_final"].name)
            if "ln_final" in mapping
            else nn.Identity()
        )
        self.n_layers = len(self._blocks)
        self.d_model = config.hidden_size
        self.d_vocab = hf_model.get_output_embeddings().weight.shape[0]
        self.n_ctx = longest_prompt(config)
        named = named_windows(config, self.n_ctx, type(hf_model).__name__)
        # The owner of the blocks (a LlamaModel, an OPTDecoder) embeds and prepares arguments; the
        # model around it unembeds.
        owner, blocks_name = mapping["blocks"].name.rsplit(".", 1)
        self._owner = owner
        as_tuple = blocks_return_tuples(hf_model, self._blocks[0])
        self._recorders = [Recorder(block, as_tuple=as_tuple) for block in self._blocks]
        root, blocks = hf_model.get_submodule(owner), {blocks_name: nn.ModuleList(self._recorders)}
        rotary = {c.name for slot, c in mapping.items() if slot.startswith("rotary_emb")}

        def spine(keeps_hooks: Callable[[str], bool]) -> nn.Module:
            # Neither the final norm nor the owner as a whole runs here for the user.
            inert = blocks | {n: nn.Identity() for n, m in root.named_children() if m is self._norm}
            others = {
                n: m if keeps_hooks(f"{owner}.{n}") else without_hooks(m)
                for n, m in root.named_children()
                if n not in inert
            }
            return shallow_copy(root, {**others, **inert}, hooks=False)

        # One embeds tokens; the other prepares arguments, and what it embeds is thrown away.
        self._embedder = spine(lambda name: name not in rotary)
        self._spine = spine(lambda name: name in rotary)
        self._head = with_submodule(hf_model, owner, Passage())
        self._mask_slot, self._cache_slot = self._find_slots()
        self._windows = self._mask_windows(named)
        # Blocks that cut by themselves do it by order, holes included: they get no cached tokens.
        self._gives_keys = self._blocks_give_keys and not self._narrow_windows(named)
        # Where blocks take no cache, only a sequence longer than any window tells of it.
        self.n_check = max([48] if self._blocks_give_keys else [48, *(w + 8 for w in named)])

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """The user's modules."""
        return (self.hf_model,) if self._wrapped_by is None else (self._wrapped_by, self.hf_model)

    @property
    def bypassed(self) -> list[nn.Module]:
        """The modules from the top down to the owner of the blocks, of which a copy runs."""
        steps = self._owner.split(".")
        names = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
        return [*self.roots, *(self.hf_model.get_submodule(name) for name in names)]

    @property
    def twin(self) -> nn.Module | None:
        """The bridge that was made over the user's modules, if one was."""
        made = vars(self).get("_on_bridge")
        return None if made is None else made.bridge()

    def refresh(self) -> None:
        """Forget the last recording: the rotary tables in it come from buffers."""
        self._recorders[0].inputs = None

    # -- the five operations

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0."""
        self._record(self._embedder, input_ids=tokens, position_ids=positions)
        return self._recorders[0].resid.to(self.device)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        positions: Int[Tensor, "batch pos"],
        start: int,
        stop: int,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        cache: Cache | None = None,
        after_block: AfterBlock | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run blocks ``start`` to ``stop - 1`` on the given residuals at the given positions."""
        if start == stop:
            return resid
        cached = None if cache is None else cache.tokens
        masks: dict[int | None, Tensor | None] = {}
        # On plain running text the model's own mask is right. Often it is None, which is faster.
        host = positions.cpu()  # on a GPU, the only wait
        plain = valid is None and cached is None and bool((host.diff() == 1).all())
        calls = self._calls(resid, positions, plain, host)
        for index in range(start, stop):
            window = self._windows[index]
            if window not in masks:
                masks[window] = (
                    calls[index].get(self._mask_slot)
                    if plain
                    else causal_mask(
                        positions,
                        dtype=self.dtype,
                        valid=valid,
                        window=window,
                        cached=cached,
                    )
                )
            of_block = None if cache is None else BlockCache(cache, index, self.device)
            resid = self._run(index, calls[index], resid, masks[window], of_block)
            if after_block is not None:
                replaced = after_block(index + 1, resid)
                resid = resid if replaced is None else replaced
        return resid

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation before the unembedding."""
        # A row is a prompt of one token to hooks, here and below.
        unshard(*self.bypassed)
        normed = self._norm(resid.reshape(-1, 1, self.d_model))
        return normed.reshape(resid.shape).to(self.device)

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits, as the model's own code makes them of its base model's output."""
        logits = self._head(inputs_embeds=normed[:, None], use_cache=False).logits
        return logits[:, 0].to(self.device)

    def prefix(self, token: int) -> Prefix | None:
        """Run ``token`` alone at position 0; return None if blocks take no cache."""
        if not self._gives_keys:
            return None
        tokens = torch.tensor([[token]], device=self.device)
        positions = torch.zeros_like(tokens)
        stream, made = [self.embed(tokens, positions)], {}
        cache = KeyValueCache(store=lambda block, *both: made.update({block: both}))
        keep = lambda _, resid: stream.append(resid)  # noqa: E731
        self.run_blocks(stream[0], positions, 0, self.n_layers, cache=cache, after_block=keep)
        return Prefix(torch.cat(stream)[:, 0], CachedTokens(positions, made.__getitem__))

    def cached_tokens(
        self, positions: Int[Tensor, "rows cached"], resid_at: Callable[[int], Tensor]
    ) -> CachedTokens | None:
        """Make keys and values of known residuals; return None if blocks take no cache."""
        if not self._gives_keys:
            return None
        # Record now: when a block runs, the recording is that of the running sequence.
        shape = (*positions.shape, self.d_model)
        resid = torch.zeros(1, dtype=self.dtype, device=self.device).expand(shape)
        calls = self._calls(resid, positions, False, positions.cpu())

        def keys_values(block: int) -> KeysValues:
            made = self._keys_values(block, calls[block], resid_at(block), inside=True)
            assert made is not None
            return made

        return CachedTokens(positions, keys_values)

    def for_few_rows(self, *, packed: bool) -> "HuggingFaceBackbone | None":
        """Return this with the kernels of few rows; None if blocks take no cache."""
        if not self._gives_keys:
            return None
        fast = self.having_blocks(lambda _, block: fast_copy(block, packed=packed))
        fast._head = fast_copy(self._head, packed=packed)
        return fast

    def having_blocks(self, change: Callable[[int, nn.Module], nn.Module]) -> "HuggingFaceBackbone":
        """Return this with ``change(number, block)`` in the place of every block."""
        other = copy.copy(self)
        other._blocks = [change(i, block) for i, block in enumerate(self._blocks)]
        return other

    def hookable(self) -> tuple["HuggingFaceBackbone", Any]:
        """Return the backbone on a bridge over the same weights, and the bridge."""
        return (self._on_bridge if self._wrapped_by is None else self), self.bridge()

    def bridge(self) -> Any:
        """Return the ``TransformerBridge`` over the same weights, made on first use."""
        return self._on_bridge.bridge() if self._wrapped_by is None else self._wrapped_by

    @cached_property
    def _on_bridge(self) -> "HuggingFaceBackbone":
        twin = tree_copy(self.hf_model)  # a bridge rebuilds the module tree that it wraps
        bridge = bridge_over(twin, copy.deepcopy(self._tokenizer))
        return HuggingFaceBackbone(twin, wrapped_by=bridge)

    # -- how blocks are called

    def _calls(self, resid: Tensor, positions: Tensor, plain: bool, host: Tensor) -> list[Call]:
        """Return the arguments of all blocks, recorded unless the last recording still holds."""
        # Rows at equal positions share the arguments of one row, as by Hugging Face's default.
        # A bridge has arguments for every row: hooks may act on them.
        recording = None
        if self._wrapped_by is None and bool((host == host[:1]).all()):
            resid, positions = resid[:1], positions[:1]
            recording = (plain, torch.is_inference_mode_enabled(), *host[0].tolist())
            if recording == self._recorders[0].inputs:
                return [recorder.call for recorder in self._recorders]
        mask = None if plain else self._dummy_mask
        self._record(self._spine, inputs_embeds=resid, position_ids=positions, attention_mask=mask)
        self._recorders[0].inputs = recording
        return [recorder.call for recorder in self._recorders]

    def _record(self, spine: nn.Module, **inputs: Any) -> None:
        """Let the model's own code prepare the arguments of every block."""
        self._recorders[0].inputs = None
        unshard(*self.bypassed)
        inputs.setdefault("attention_mask", self._dummy_mask)
        spine(**inputs, use_cache=False)

    @property
    def _dummy_mask(self) -> Tensor:
        # It only has to be 4-D: then the model derives no mask from positions. Blocks get ours.
        return torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)

    def _run(
        self, index: int, call: Call, resid: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        if mask is not None:  # some families ask for a mask of every row
            mask = mask.expand(len(resid), -1, -1, -1)
        call = call.having(self._mask_slot, mask)
        if cache is not None and self._cache_slot is not None:
            call = call.having(self._cache_slot, cache)
        out = self._blocks[index](resid, *call.args, **call.kwargs)
        return (out[0] if isinstance(out, tuple) else out).to(self.device)

    def _keys_values(
        self, index: int, call: Call, resid: Tensor, *, inside: bool = False
    ) -> KeysValues | None:
        """Run a block until it has made its keys and values; return None if it asks no cache."""
        block = self._blocks[index]
        # FSDP frees weights when a run ends, which may not be inside a run of the same block.
        only = KeysOnly(goes_on=class_of(block) is not type(block) and not inside)
        try:
            self._run(index, call, resid, self._dummy_mask, only)
        except KeysMade as end:
            let_go(block)
            only.made = end.keys, end.values
        made = only.made
        return made and (made[0].to(self.device), made[1].to(self.device))

    @cached_property
    def _blocks_give_keys(self) -> bool:
        if self._cache_slot is None:
            return False
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            resid = self.embed(one, one)
            calls = self._calls(resid, one, False, one.cpu())
            return all(self._keys_values(i, call, resid) for i, call in enumerate(calls))

    def _mask_windows(self, named: Sequence[int]) -> list[int | None]:
        """Read the windows off the model's own masks; shorten the context to what was read."""
        n = mask_length(named, self.n_ctx)
        if any(window >= n for window in named):
            self.n_ctx = n
        positions = torch.arange(n, device=self.device)[None]
        resid = torch.zeros(1, dtype=self.dtype, device=self.device).expand(1, n, self.d_model)
        with torch.no_grad():
            calls = self._calls(resid, positions, True, positions.cpu())
        self._recorders[0].inputs = None
        kind, slot = type(self.hf_model).__name__, self._mask_slot
        masks = {id(mask): mask for mask in (call.get(slot) for call in calls)}
        widths = {key: window_of(mask, n, kind) for key, mask in masks.items()}
        return [widths[id(call.get(slot))] for call in calls]

    def _narrow_windows(self, named: Sequence[int]) -> bool:
        """Narrow the windows to those that blocks apply by themselves; return whether any does."""
        at = torch.full((1, 1), min(self.n_ctx - 1, _FAR), device=self.device)
        narrowed = False
        with torch.no_grad():
            resid = self.embed(torch.ones_like(at), at)
            calls = self._calls(resid, at, False, at.cpu())
            for index, call in enumerate(calls):

                def run(
                    made: KeysValues, positions: Tensor, mask: Tensor, i: int = index
                ) -> Tensor:
                    rows = resid.expand(len(made[0]), -1, -1)
                    tokens = CachedTokens(positions, lambda _: made)
                    cache = BlockCache(KeyValueCache(tokens), i, self.device)
                    return self._run(i, calls[i], rows, mask, cache)

                made = self._keys_values(index, call, resid)
                assert made is not None
                try:
                    own = own_window(made, named, self.n_ctx, run)
                except ValueError as error:
                    raise UnsupportedModelError(
                        f"Block {index} of {type(self.hf_model).__name__} does not attend to all "
                        f"that its mask allows: {error}. So its tokens cannot be run exactly."
                    ) from error
                if own is not None:
                    narrowed = True
                    self._windows[index] = min(own, self._windows[index] or own)
        self._recorders[0].inputs = None
        return narrowed

    def _find_slots(self) -> tuple[Slot, Slot | None]:
        """Find the places of the mask and of the key/value cache among a block's arguments."""
        mask, cache = self._dummy_mask, DynamicCache()
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            self._record(
                self._embedder,
                input_ids=zero,
                position_ids=zero,
                attention_mask=mask,
                past_key_values=cache,
            )
        refuse_idle(self.hf_model, [hasattr(recorder, "resid") for recorder in self._recorders])
        mask_slot = self._recorders[0].call.slot_of(mask)
        if mask_slot is None:
            raise UnsupportedModelError(
                f"{type(self.hf_model).__name__} does not hand a 4-D attention mask to its blocks "
                f"(attention implementation {self.hf_model.config._attn_implementation!r}), so "
                "two distant tokens cannot be run exactly. Load the model with "
                "attn_implementation='sdpa' or 'eager'."
            )
        return mask_slot, self._recorders[0].call.slot_of(cache)
