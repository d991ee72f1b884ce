"""Read llama2.c "legacy v0" checkpoints and their tokenizers into Hugging Face objects.

A checkpoint is a header of seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
seq_len) and then float32 tensors, each kind stacked over layers. A negative vocab_size means that
the unembedding is a separate matrix. The rotary embedding rotates neighbouring pairs (0,1), (2,3),
... of a head. Hugging Face rotates (0, d/2), (1, d/2+1), ... So the rows of the query and key
matrices are reordered, which does not change the attention scores.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_HEADER = struct.Struct("<7i")
_NEWER_MAGIC = 0x616B3432  # "ak42": llama2.c versions 1 and 2 start with it, v0 has no magic
_ROPE_THETA = 10000.0
_NORM_EPS = 1e-5  # fixed in llama2.c, not in the file
_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
_FIRST_PIECE = 3 + 256  # the 256 byte tokens come after the special ones


def load_llama2c(
    model_path: str | Path, tokenizer_path: str | Path
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a llama2.c v0 checkpoint and its tokenizer.

    The model is float32 and in eval mode. The tokenizer puts BOS (id 1) first unless
    ``add_special_tokens=False``. Generation stops at EOS (id 2) and at BOS, because llama2.c models
    write BOS between documents.
    """
    model = _read_model(Path(model_path))
    tokenizer = _read_tokenizer(Path(tokenizer_path), model.config.vocab_size)
    return model, tokenizer


def _read_config(path: Path, header: bytes) -> LlamaConfig:
    """Return the configuration that the header describes."""
    if len(header) < _HEADER.size:
        raise ValueError(
            f"{path} is cut short: {len(header)} bytes, but the header alone has {_HEADER.size}."
        )
    dim, hidden, n_layers, n_heads, n_kv, vocab, seq_len = _HEADER.unpack(header)
    if dim == _NEWER_MAGIC:
        raise ValueError(
            f"{path} is a llama2.c checkpoint of version {hidden}; only the legacy version 0 "
            "(no magic number) can be read."
        )
    plausible = (
        min(dim, hidden, n_layers, n_heads, n_kv, abs(vocab), seq_len) > 0
        and dim % n_heads == 0
        and n_heads % n_kv == 0
        and (dim // n_heads) % 2 == 0
    )
    if not plausible:
        raise ValueError(
            f"{path} is not a llama2.c v0 checkpoint: its header reads dim={dim}, "
            f"hidden_dim={hidden}, n_layers={n_layers}, n_heads={n_heads}, n_kv_heads={n_kv}, "
            f"vocab_size={vocab}, seq_len={seq_len}."
        )
    # The rope theta stays at its default, 10000, which is checked against the file below: the
    # argument's name changed between transformers 4 and 5.
    return LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        vocab_size=abs(vocab),
        max_position_embeddings=seq_len,
        rms_norm_eps=_NORM_EPS,
        tie_word_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def _file_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the stacked tensors in the order of the file."""
    d, h, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    d_head = d // config.num_attention_heads
    d_kv = config.num_key_value_heads * d_head
    vocab, seq_len = config.vocab_size, config.max_position_embeddings
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocab, d),
        "input_layernorm": (n, d),
        "self_attn.q_proj": (n, d, d),
        "self_attn.k_proj": (n, d_kv, d),
        "self_attn.v_proj": (n, d_kv, d),
        "self_attn.o_proj": (n, d, d),
        "post_attention_layernorm": (n, d),
        "mlp.gate_proj": (n, h, d),
        "mlp.down_proj": (n, d, h),
        "mlp.up_proj": (n, h, d),
        "norm": (d,),
        "rope_cos": (seq_len, d_head // 2),
        "rope_sin": (seq_len, d_head // 2),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (vocab, d)
    return shapes


def _pairs_to_halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from (0,1),(2,3),.. rotary pairs to (0,d/2),(1,d/2+1),.. ."""
    return rearrange(weight, "(head pair two) d -> (head two pair) d", head=n_heads, two=2)


def _read_model(path: Path) -> LlamaForCausalLM:
    with path.open("rb") as stream:
        config = _read_config(path, stream.read(_HEADER.size))
    shapes = _file_shapes(config)
    expected = _HEADER.size + 4 * sum(math.prod(shape) for shape in shapes.values())
    found = path.stat().st_size
    if found != expected:
        what = "is cut short" if found < expected else "has bytes left over"
        raise ValueError(
            f"{path} {what}: {found} bytes, but its header (dim={config.hidden_size}, "
            f"n_layers={config.num_hidden_layers}, vocab_size={config.vocab_size}) asks for "
            f"{expected}."
        )

    flat = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=_HEADER.size))
    tensors: dict[str, torch.Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[name] = flat[start:stop].view(shape)
        start = stop
    _check_rope(path, tensors.pop("rope_cos"), tensors.pop("rope_sin"))

    embed = tensors.pop("embed_tokens")
    state = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": tensors.pop("norm"),
        "lm_head.weight": tensors.pop("lm_head", embed),
    }
    for name, stacked in tensors.items():
        for layer, weight in enumerate(stacked):
            if name == "self_attn.q_proj":
                weight = _pairs_to_halves(weight, config.num_attention_heads)
            elif name == "self_attn.k_proj":
                weight = _pairs_to_halves(weight, config.num_key_value_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight

    with torch.random.fork_rng(devices=[]):  # the initial weights must not use up the user's seed
        model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(state)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = [2, 1]
        model.generation_config.pad_token_id = 2
    return model.eval()


def _check_rope(path: Path, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuse a rotary table that the model built here would not reproduce."""
    seq_len, half = cos.shape
    inverse = _ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * inverse
    error = max((angle.cos() - cos).abs().max().item(), (angle.sin() - sin).abs().max().item())
    # float32 angles of thousands of radians are off by up to about 1e-3; another theta by about 1
    if not error < 1e-2:
        raise ValueError(
            f"{path} has a rotary table that differs by {error:.3g} from that of theta "
            f"{_ROPE_THETA:g}: this reader would compute another model."
        )


def _read_pieces(path: Path, vocab_size: int) -> list[tuple[bytes, float]]:
    """Return all (piece, score) of a tokenizer.bin, in the order of their ids."""
    data = path.read_bytes()
    pieces: list[tuple[bytes, float]] = []
    at = 4  # the longest piece's length, an int32 that only C code needs
    while len(pieces) < vocab_size:
        try:
            score, length = struct.unpack_from("<fi", data, at)
        except struct.error:
            length = -1
        if length < 0 or at + 8 + length > len(data):
            raise ValueError(
                f"{path} is cut short, or not a llama2.c tokenizer: {len(data)} bytes hold "
                f"{len(pieces)} whole tokens, but the checkpoint has {vocab_size}."
            )
        pieces.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    if at != len(data):
        raise ValueError(
            f"{path} has {len(data) - at} bytes left over after the {vocab_size} tokens of the "
            "checkpoint: it belongs to another model."
        )
    return pieces


def _read_tokenizer(path: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    pieces = _read_pieces(path, vocab_size)
    if vocab_size < _FIRST_PIECE:
        raise ValueError(
            f"{path} has {vocab_size} tokens, fewer than the {_FIRST_PIECE} special and byte "
            "tokens of a Llama vocabulary."
        )
    # Special and byte tokens go by their id: exports of llama2.c spell them in different ways
    # ("<0x0A>", a raw byte, "\n<s>\n"). Spaces become the sentencepiece mark again.
    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    try:
        names += [piece.decode("utf-8").replace(" ", "▁") for piece, _ in pieces[_FIRST_PIECE:]]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a llama2.c tokenizer: a token is not UTF-8.") from error
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ValueError(f"{path} has {len(names) - len(vocab)} tokens that occur twice.")
    scores = {name: pieces[i][1] for name, i in vocab.items() if i >= _FIRST_PIECE}

    # sentencepiece joins the neighbours whose union has the best score. That equals a rank for
    # every split of every piece. Of equal scores the longer left part is the leftmost join.
    merges = [
        (name[:cut], name[cut:])
        for name in scores
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    merges.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))

    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in _SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",  # the vocabulary has no padding token; padding is masked anyway
        clean_up_tokenization_spaces=False,
    )
