"""Vectors: the residuals at labels and final position, means against plain loops, files."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from reference import hidden_states
from tiny import tiny, tiny_tokenizer

from spade_lens import Model, Prompt, load
from spade_lens.icl.geometry.convergence import convergence
from spade_lens.icl.setup import PromptSetup
from spade_lens.icl.vectors import (
    RuleVectors,
    demonstration_labels,
    final_position_vectors,
    rule_vectors,
)
from spade_lens.prompts import Template
from spade_lens.tasks import RuleTask
from spade_lens.tensors import label_mean_of_others, mean_by_label, mean_of_others, random_like

EXACT = {"atol": 1e-4, "rtol": 0.0}
TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
TASK = RuleTask("t", {"x": ("a", "bb", "ccc", "d", "ee"), "y": ("ff", "g", "hhh", "i", "jj")})


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return TASK.prompts(tiny_tokenizer(), 6, shots=4, template=TIGHT)


def test_vectors_are_the_residuals_at_labels_and_final_position(prompts: list[Prompt]) -> None:
    hf_model = tiny("llama")
    model = load(hf_model, tokenizer=tiny_tokenizer())
    found = rule_vectors(model, prompts)
    rules, finals = found.tensor, final_position_vectors(model, prompts, layers=[1, 3])
    assert rules.shape == (5, 6, 4, 32)
    for i, prompt in enumerate(prompts):
        stream = torch.stack(hidden_states(hf_model, prompt.tokens))
        for j, position in enumerate(prompt.spans["labels"]):
            torch.testing.assert_close(rules[:, i, j], stream[:, position], **EXACT)
        torch.testing.assert_close(finals[:, i], stream[[1, 3], -1], **EXACT)
    assert found.shape == (5, 6, 4, 32) and found.layers == (0, 1, 2, 3, 4)
    assert torch.equal(found.at((3, 1)).tensor, rules[[3, 1]])
    frame = found.at(3).to_frame()
    assert frame["position"].tolist() == [at for p in prompts for at in p.spans["labels"]]
    assert frame["label_id"].tolist() == [p.tokens[at] for p in prompts for at in p.spans["labels"]]
    assert set(frame["label"]) == {"A", "B"}
    assert frame["norm"].tolist() == pytest.approx(rules[3].norm(dim=-1).flatten().tolist())


def test_episodes_tell_their_rules(prompts: list[Prompt], tiny_llama: Model) -> None:
    episodes = TASK.episodes(6, shots=4)
    of_episodes = rule_vectors(tiny_llama, episodes, layers=2, setup=PromptSetup(TIGHT))
    of_prompts = rule_vectors(tiny_llama, prompts, layers=2)
    assert torch.equal(of_episodes.tensor, of_prompts.tensor)
    assert of_episodes.rules == tuple(e.rule for e in episodes) and of_episodes.task == "t"
    assert of_prompts.rule_numbers is None
    expected = [["AB".index(out) for _, out in e.demonstrations] for e in episodes]
    assert of_prompts.labels is not None and of_prompts.labels.tolist() == expected
    # The analyses take rules and labels of the vectors that know them.
    known = convergence(of_episodes, shuffles=2)
    given = convergence(
        of_prompts.tensor, rule=of_episodes.rule_numbers, label=of_prompts.labels, shuffles=2
    )
    assert known["layer"].unique().tolist() == [2]
    pd.testing.assert_frame_equal(known.drop(columns="layer"), given.drop(columns="layer"))


def test_vectors_that_do_not_fit_are_refused() -> None:
    tensor = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"layers=\[1\] was given; expected the layers of the 2"):
        RuleVectors(tensor, layers=(1,))
    with pytest.raises(ValueError, match="2 rules were given for vectors of 3 prompts"):
        RuleVectors(tensor, rules=("a", "b"))
    with pytest.raises(
        ValueError, match=r"Layers \[7\] were asked for; these vectors are of layers 0, 1"
    ):
        RuleVectors(tensor).at(7)
    with pytest.raises(ValueError, match="do not know the model"):
        RuleVectors(tensor).save("v.safetensors")


def test_labels_of_demonstrations(prompts: list[Prompt]) -> None:
    episodes = TASK.episodes(6, shots=4)
    expected = [["AB".index(out) for _, out in e.demonstrations] for e in episodes]
    assert demonstration_labels(prompts).tolist() == expected


def test_means_equal_plain_loops() -> None:
    vectors = torch.randn(2, 6, 3, 5)
    labels = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 0, 0]])
    groups = ["x", "y", "x", "y", "y", "x"]
    others = mean_of_others(vectors, groups)
    by_label = label_mean_of_others(vectors, labels, groups)
    plain = mean_by_label(vectors, labels)
    for i in range(6):
        same = [k for k in range(6) if groups[k] == groups[i] and k != i]
        torch.testing.assert_close(others[:, i], vectors[:, same].mean(dim=1), **EXACT)
        for j in range(3):
            rows = [
                vectors[:, k, m] for k in same for m in range(3) if labels[k, m] == labels[i, j]
            ]
            torch.testing.assert_close(by_label[:, i, j], torch.stack(rows).mean(dim=0), **EXACT)
    for label in (0, 1):
        rows = [vectors[:, k, m] for k in range(6) for m in range(3) if labels[k, m] == label]
        torch.testing.assert_close(plain[:, label], torch.stack(rows).mean(dim=0), **EXACT)
    finals = vectors[:, :, 0]
    torch.testing.assert_close(mean_of_others(finals, groups), others[:, :, 0], **EXACT)


def test_means_by_answer_lean_to_none() -> None:
    answers, groups = "ABABBABA", "xxyyxxyy"
    # All that a vector says is its answer.
    vectors = torch.tensor([1.0 if answer == "A" else -1.0 for answer in answers])[None, :, None]
    plain = mean_of_others(vectors, groups)
    torch.testing.assert_close(plain, -vectors / 3)
    assert (mean_of_others(vectors, groups, answers=answers) == 0).all()
    vectors = torch.randn(2, 8, 3, 5)
    found = mean_of_others(vectors, "xxxxxxyy", answers="ABABACAB")
    expected = {
        0: [[2, 4], [1, 3], [5]],
        3: [[0, 2, 4], [1], [5]],
        5: [[0, 2, 4], [1, 3]],  # nobody else has its answer
        6: [[7]],
    }
    for i, cells in expected.items():
        mean = torch.stack([vectors[:, some].mean(dim=1) for some in cells]).mean(dim=0)
        torch.testing.assert_close(found[:, i], mean, **EXACT)


def test_random_vectors_have_the_norms_and_nothing_else() -> None:
    vectors = torch.randn(3, 4, 2, 500)
    random = random_like(vectors)
    torch.testing.assert_close(random.norm(dim=-1), vectors.norm(dim=-1))
    assert torch.cosine_similarity(random, vectors, dim=-1).abs().max() < 0.25
    assert torch.equal(random, random_like(vectors))
    assert not torch.equal(random, random_like(vectors, seed=1))


def test_saved_vectors_come_back(tmp_path: Path, tiny_llama: Model) -> None:
    episodes = TASK.episodes(6, shots=4)
    vectors = rule_vectors(tiny_llama, episodes, layers=[1, 4], setup=PromptSetup(TIGHT))
    path = vectors.save(tmp_path / "new" / "v.safetensors")
    found = RuleVectors.load(path, tiny_llama)
    assert torch.equal(found.tensor, vectors.tensor)
    for name in ("layers", "prompts", "rules", "task", "model"):
        assert getattr(found, name) == getattr(vectors, name)
    pd.testing.assert_frame_equal(found.to_frame(), vectors.to_frame())
    assert repr(found) == ("RuleVectors(t; layers 1, 4; 6 prompts of 4 demonstrations; d_model 32)")
    other = load(tiny("qwen2"), tokenizer=tiny_tokenizer(), name="other")
    with pytest.raises(ValueError, match="belongs to 'tiny-llama'.*was given 'other'"):
        RuleVectors.load(path, other)
    kept = path.read_bytes()
    RuleVectors(vectors.tensor + 1, model=tiny_llama).save(path)
    path.write_bytes(kept)
    with pytest.raises(ValueError, match="not the file that v.json beside it"):
        RuleVectors.load(path, tiny_llama)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no v.safetensors"):
        RuleVectors.load(path, tiny_llama)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        vectors.save(tmp_path / "v.pt")


def test_vectors_of_a_model_that_has_changed_are_not_saved_as_its_own(
    prompts: list[Prompt], tmp_path: Path
) -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    taken = rule_vectors(model, prompts, layers=[0, 2, 4])
    hf_model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    for vectors in (taken, taken.at([2])):
        with pytest.raises(ValueError, match="not what x gives now: it has been changed since"):
            vectors.save(tmp_path / "v.safetensors")
    taken.at(0).save(tmp_path / "v.safetensors")  # the embedding is what it was
    hf_model.model.embed_tokens.weight.data.mul_(2)
    made = RuleVectors(torch.ones(1, len(prompts), 1, 32), prompts=tuple(prompts), model=model)
    made.save(tmp_path / "made.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, z: mean_of_others(v, ["x", "x", "y"]), "group 'y' has one prompt only"),
        (lambda v, z: mean_of_others(v, ["x", "x"]), "2 groups were given for 3 prompts"),
        (lambda v, z: mean_of_others(v, "xxx", answers="A"), "1 answers were given for 3 prompts"),
        (lambda v, z: label_mean_of_others(v, z, ["x", "x", "x"]), "has the label 1 of prompt 0"),
        (lambda v, z: label_mean_of_others(v, z - 1, ["x", "x", "x"]), "negative label"),
        (lambda v, z: mean_by_label(v, 2 * z), r"Labels \[1\] never occur"),
    ],
)
def test_wrong_groups_and_labels_are_named(call: Any, message: str) -> None:
    labels = torch.tensor([[0, 1], [0, 0], [0, 0]])
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 3, 2, 4), labels)


def test_prompts_must_have_as_many_demonstrations(tiny_llama: Model) -> None:
    some = [
        prompt
        for shots in (2, 3)
        for prompt in TASK.prompts(tiny_llama.tokenizer, 1, shots=shots, template=TIGHT)
    ]
    with pytest.raises(ValueError, match="Prompt 1 has 3 demonstrations .* prompt 0 has 2"):
        rule_vectors(tiny_llama, some)
    with pytest.raises(ValueError, match="Prompt 0 has 0 demonstrations"):
        rule_vectors(tiny_llama, [Prompt(tokens=(1, 2))])
    with pytest.raises(ValueError, match="No prompts were given"):
        rule_vectors(tiny_llama, [])


def test_episodes_are_taken_by_both_kinds_of_vectors() -> None:
    model = load(tiny("llama"), tokenizer=tiny_tokenizer())
    episodes = RuleTask("mine", {"x": ("a", "b"), "y": ("c", "d")}).episodes(3, shots=2)
    setup = PromptSetup(template=TIGHT)
    prompts = setup.prompts(model, episodes)
    finals = final_position_vectors(model, episodes, layers=[2], setup=setup)
    assert torch.equal(finals, final_position_vectors(model, prompts, layers=[2]))
    rules = rule_vectors(model, episodes, layers=[2], setup=setup)
    assert torch.equal(rules.tensor, rule_vectors(model, prompts, layers=[2]).tensor)
