"""llama2.c files: the Hugging Face model computes what llama2.c computes, bad files are refused."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from spade_lens.models.catalogue import fetch_model_files
from spade_lens.models.llama2c import load_llama2c

VOCAB = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [bytes([b]) for b in range(256)]
# (piece, score): as in sentencepiece, early merges have the better scores
PIECES = [
    (b" t", -1.0), (b"he", -2.0), (b" the", -3.0), (b"at", -4.0), (b" c", -5.0), (b" cat", -6.0),
    (b"  ", -1e9), (b" ", -10.0), (b"t", -11.0), (b"h", -12.0), (b"e", -13.0), (b"a", -14.0),
    (b"c", -15.0), ("é".encode(), -16.0),
]  # fmt: skip
N_VOCAB = len(VOCAB) + len(PIECES)


def write_tokenizer(path: Path) -> Path:
    pieces = [(piece, 0.0) for piece in VOCAB] + PIECES
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    path.write_bytes(struct.pack("<i", 9) + body)
    return path


def random_weights(shared: bool, n_kv: int = 2) -> dict:
    """Weights of a tiny model, by the names of llama2.c, each stacked over layers."""
    rng = np.random.default_rng(0)
    dim, hidden, n_layers, n_heads, seq = 16, 24, 2, 4, 12
    d_head = dim // n_heads
    angle = np.arange(seq)[:, None] * 1e4 ** (-np.arange(0, d_head, 2) / d_head)
    shapes = {
        "embedding": (N_VOCAB, dim), "rms_att": (n_layers, dim), "wq": (n_layers, dim, dim),
        "wk": (n_layers, n_kv * d_head, dim), "wv": (n_layers, n_kv * d_head, dim),
        "wo": (n_layers, dim, dim), "rms_ffn": (n_layers, dim), "w1": (n_layers, hidden, dim),
        "w2": (n_layers, dim, hidden), "w3": (n_layers, hidden, dim), "rms_final": (dim,),
    }  # fmt: skip
    w = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in shapes.items()}
    w |= {"cos": np.cos(angle).astype("<f4"), "sin": np.sin(angle).astype("<f4")}
    if not shared:
        w["wcls"] = rng.normal(0, 0.5, (N_VOCAB, dim)).astype("<f4")
    w["header"] = (dim, hidden, n_layers, n_heads, n_kv, N_VOCAB if shared else -N_VOCAB, seq)
    return w


def write_model(path: Path, w: dict) -> Path:
    body = b"".join(a.tobytes() for name, a in w.items() if name != "header")
    path.write_bytes(struct.pack("<7i", *w["header"]) + body)
    return path


def llama2c_logits(w: dict, tokens: list[int]) -> np.ndarray:
    """The arithmetic of llama2.c in numpy, one position after the other: [pos vocab]."""
    dim, _, n_layers, n_heads, n_kv, _, _ = w["header"]
    d_head = dim // n_heads

    def norm(x, gain):
        return x / np.sqrt((x * x).mean() + 1e-5) * gain

    def rotate(x, pos):  # neighbouring pairs (0,1), (2,3), ... of each head
        pairs = x.reshape(-1, d_head // 2, 2)
        c, s = w["cos"][pos], w["sin"][pos]
        even, odd = pairs[..., 0], pairs[..., 1]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(-1, d_head)

    keys: list[list] = [[] for _ in range(n_layers)]
    values: list[list] = [[] for _ in range(n_layers)]
    logits = []
    for pos, token in enumerate(tokens):
        x = w["embedding"][token].astype("f8")
        for layer in range(n_layers):
            h = norm(x, w["rms_att"][layer])
            q = rotate(w["wq"][layer] @ h, pos)
            keys[layer].append(rotate(w["wk"][layer] @ h, pos))
            values[layer].append((w["wv"][layer] @ h).reshape(n_kv, d_head))
            heads = []
            for head in range(n_heads):
                kv = head // (n_heads // n_kv)
                score = np.array([k[kv] @ q[head] for k in keys[layer]]) / math.sqrt(d_head)
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                heads.append(sum(p * v[kv] for p, v in zip(weight, values[layer], strict=True)))
            x = x + w["wo"][layer] @ np.concatenate(heads)
            h = norm(x, w["rms_ffn"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        logits.append(w.get("wcls", w["embedding"]) @ norm(x, w["rms_final"]))
    return np.stack(logits)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_logits_equal_those_of_llama2c(tmp_path, shared, n_kv):
    w = random_weights(shared, n_kv)
    model, _ = load_llama2c(write_model(tmp_path / "m.bin", w), write_tokenizer(tmp_path / "t.bin"))
    tokens = [1, 260, 7, 262, 265, 3, 3, 259, 100]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(logits.numpy(), llama2c_logits(w, tokens), rtol=1e-3, atol=1e-3)
    assert model.config.tie_word_embeddings is shared
    assert model.dtype == torch.float32 and not model.training


def test_loading_leaves_the_random_state_alone(tmp_path):
    m, t = write_model(tmp_path / "m", random_weights(True)), write_tokenizer(tmp_path / "t")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_llama2c(m, t)
    assert torch.equal(torch.rand(4), expected)


@pytest.fixture
def tiny_tokenizer(tmp_path):
    m, t = write_model(tmp_path / "m", random_weights(True)), write_tokenizer(tmp_path / "t")
    return load_llama2c(m, t)[1]


def test_merges_follow_the_scores(tiny_tokenizer):
    assert tiny_tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    assert tiny_tokenizer.tokenize("heat") == ["▁", "he", "at"]


def test_unknown_characters_become_bytes_and_come_back(tiny_tokenizer):
    text = "the cat 🙂 é\n\tthe"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 3 + ord("\n") in ids
    assert tiny_tokenizer.decode(ids) == text


def test_special_ids_are_those_of_llama(tiny_tokenizer):
    assert (tiny_tokenizer.unk_token_id, tiny_tokenizer.bos_token_id) == (0, 1)
    assert tiny_tokenizer.eos_token_id == 2
    assert tiny_tokenizer("the")["input_ids"][0] == 1
    assert tiny_tokenizer("the", add_special_tokens=False)["input_ids"][0] != 1
    assert len(tiny_tokenizer.get_vocab()) == len(tiny_tokenizer) == N_VOCAB


def test_tokenizer_can_be_saved_and_loaded_as_any_other(tiny_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tiny_tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again("the  cat é")["input_ids"] == tiny_tokenizer("the  cat é")["input_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:10], "is cut short: 10 bytes, but the header alone has 28"),
        (lambda data: data[:-4], r"is cut short: \d+ bytes, but its header .* asks for \d+"),
        (lambda data: data + b"tail", "has bytes left over"),
        (lambda data: b"GGUF" * 7 + data[28:], "is not a llama2.c v0 checkpoint"),
        (
            lambda data: struct.pack("<Ii", 0x616B3432, 1) + data[8:],
            "of version 1; only the legacy version 0",
        ),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, change, message):
    m, t = write_model(tmp_path / "m", random_weights(True)), write_tokenizer(tmp_path / "t")
    m.write_bytes(change(m.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_llama2c(m, t)


def test_another_rotary_base_is_refused(tmp_path):
    w = random_weights(True)
    w["cos"], w["sin"] = w["cos"][:, ::-1].copy(), w["sin"][:, ::-1].copy()
    with pytest.raises(ValueError, match="rotary table that differs by .* theta 10000"):
        load_llama2c(write_model(tmp_path / "m", w), write_tokenizer(tmp_path / "t"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], f"cut short.*hold {N_VOCAB - 1} whole tokens.*has {N_VOCAB}"),
        (lambda data: data[:5], "cut short.*hold 0 whole tokens"),
        (lambda data: data + b"abc", "3 bytes left over"),
        (lambda data: data[:-2] + b"\xff\xff", "a token is not UTF-8"),
    ],
)
def test_a_file_that_is_not_its_tokenizer_is_refused(tmp_path, change, message):
    m, t = write_model(tmp_path / "m", random_weights(True)), write_tokenizer(tmp_path / "t")
    t.write_bytes(change(t.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_llama2c(m, t)


@pytest.mark.download
def test_stories15m_tells_a_story_and_its_tokenizer_round_trips():
    model, tokenizer = load_llama2c(*fetch_model_files("stories15m"))
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, 9038, 2501, 263, 931]]
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "sunshine. One day, she saw a big, red ball in the sky."
    )
    for text in ["Hello world", "  two  spaces\n\tand 日本語 🙂 é\r\n", "France -> Paris\n" * 3]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
