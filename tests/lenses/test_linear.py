"""The linear lenses: what their maps do, and what they refuse."""

import pytest
import torch
from tiny import tiny

from spade_lens import Lens, LogitLens, Model, Prompt, capture, load, read
from spade_lens.lenses import Reading
from spade_lens.lenses.linear import AffineMaps, LinearSpade, TunedLens

PROMPTS = [Prompt(tokens=(1, 5, 9, 30, 77)), Prompt(tokens=(1, 8)), Prompt(tokens=(2, 3, 4))]


def some_maps(rank: int | None = None, layers: tuple[int, ...] = (0, 1, 2, 3)) -> AffineMaps:
    inner = 32 if rank is None else rank
    down = None if rank is None else torch.randn(len(layers), rank, 32)
    return AffineMaps(
        layers, torch.randn(len(layers), 32, inner), torch.randn(len(layers), 32), down
    )


@pytest.mark.parametrize("kind", [TunedLens, LinearSpade])
def test_is_a_lens_with_a_name(tiny_llama: Model, kind: type) -> None:
    lens = kind(tiny_llama, some_maps())
    assert isinstance(lens, Lens)
    assert lens.name == kind.kind
    assert lens.held_out.empty
    assert "full rank" in repr(lens) and "tiny-llama" in repr(lens)
    assert "rank 3" in repr(kind(tiny_llama, some_maps(3)))
    names = {"model": tiny_llama, "maps": lens.maps, kind.__name__: kind}
    back = eval(repr(kind(tiny_llama, lens.maps, name="mine")), names)
    assert (type(back), back.name, back.maps.layers) == (kind, "mine", lens.maps.layers)
    assert all(torch.equal(back.maps.tensors[n], t) for n, t in lens.maps.tensors.items())
    assert repr(lens.maps) == "AffineMaps(4 layers from 0 to 3, full rank, d_model=32)"


@pytest.mark.parametrize("rank", [None, 3])
def test_is_identity_plus_matrix_plus_bias(tiny_llama: Model, rank: int | None) -> None:
    maps = some_maps(rank)
    residuals = capture(tiny_llama, PROMPTS)
    readings = [Reading(i, p.answer, (p.answer,)) for i, p in enumerate(PROMPTS)]
    finals = LinearSpade(tiny_llama, maps).final_residuals(residuals, readings, [0, 2, 4])
    for i, prompt in enumerate(PROMPTS):
        for n, layer in enumerate([0, 2]):
            h = residuals.layer(layer)[residuals.slots(i, [prompt.answer])[0]]
            matrix = maps.up[layer] if maps.down is None else maps.up[layer] @ maps.down[layer]
            expected = h + matrix @ h + maps.bias[layer]
            torch.testing.assert_close(finals[n, i], expected, atol=1e-4, rtol=1e-5)


def test_is_the_model_at_the_last_layer(tiny_llama: Model) -> None:
    readout = read(PROMPTS, LinearSpade(tiny_llama, some_maps()), layers=[2, 4])
    assert readout.agrees[0, 1].all() and not readout.kl[0, 1].any()
    assert readout.kl[0, 0].all()


def test_identity_is_the_logit_lens_to_the_bit(tiny_llama: Model) -> None:
    identity = TunedLens(tiny_llama, AffineMaps.identity(range(4), 32))
    readout = read(PROMPTS[0], [identity, LogitLens(tiny_llama)], positions="all", top_k=1)
    for field in (readout.entropy, readout.kl, readout.top_logprobs):
        assert torch.equal(field[0], field[1])


def test_batch_equals_single(tiny_llama: Model) -> None:
    lens = LinearSpade(tiny_llama, some_maps())
    together = read(PROMPTS, lens)
    for i, prompt in enumerate(PROMPTS):
        alone = read([prompt], lens)
        torch.testing.assert_close(
            together.entropy[:, :, i], alone.entropy[:, :, 0], atol=1e-5, rtol=1e-5
        )


def test_works_beside_another_lens_at_its_own_layers_only(tiny_llama: Model) -> None:
    lens = TunedLens(tiny_llama, some_maps(layers=(1, 3)))
    assert read(PROMPTS, [lens, LogitLens(tiny_llama)], layers=[1, 3, 4]).layers == (1, 3, 4)
    assert read(PROMPTS, lens).layers == read(PROMPTS, ["logit", lens]).layers == (1, 3, 4)
    with pytest.raises(ValueError, match=r"Layers \[2\].* tuned lens reads at layers \[1, 3, 4\]"):
        read(PROMPTS, lens, layers=[2])
    with pytest.raises(ValueError, match=r"no map for layer 2; it was fitted at layers \[1, 3\]"):
        lens.at(torch.randn(2, 32), 2)
    with pytest.raises(ValueError, match=r"no map for layer 2, only for layers \[1, 3\]"):
        lens.maps(torch.randn(2, 32), 2)


def test_half_precision_keeps_its_dtype() -> None:
    model = load(tiny("llama").bfloat16(), name="half")
    lens = LinearSpade(model, some_maps())
    assert lens.at(torch.randn(3, 32).bfloat16(), 1).dtype == torch.bfloat16
    assert read(PROMPTS, lens).entropy.isfinite().all()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (AffineMaps.identity([0, 1], 16), "width 16; tiny-llama has d_model=32"),
        (AffineMaps.identity([0, 4], 32), "layers 0 to 3 .at 4 the lens is the model"),
        (AffineMaps.identity([-1, 0], 32), "layers 0 to 3"),
        (AffineMaps.identity([], 32), "layers 0 to 3"),
    ],
)
def test_maps_of_another_model_are_refused(
    tiny_llama: Model, maps: AffineMaps, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TunedLens(tiny_llama, maps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_maps_that_are_not_finite_are_refused(tiny_llama: Model, bad: float) -> None:
    maps = some_maps()
    maps.bias[2, 5] = bad
    with pytest.raises(ValueError, match=r"bias is NaN or infinite at layers \[2\]"):
        LinearSpade(tiny_llama, maps)


def test_maps_check_their_shapes() -> None:
    with pytest.raises(ValueError, match="expected them ascending"):
        AffineMaps((1, 0), torch.zeros(2, 8, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="or no down and rank = d_model"):
        AffineMaps((0, 1), torch.zeros(2, 8, 3), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="Maps of 3 layers have up"):
        AffineMaps((0, 1, 2), torch.zeros(2, 8, 8), torch.zeros(2, 8))


def test_a_lens_of_blocks_that_are_gone_says_so() -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    lens = TunedLens(model, AffineMaps.identity(range(4), 32))
    del hf_model.model.layers[3]
    hf_model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\] were given; x can have .* 0 to 2"):
        read(PROMPTS, lens)
