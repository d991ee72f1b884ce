"""Vectors: the residuals at labels and arrow, means against plain loops, files, bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import hidden_states
from tiny import tiny, tiny_tokenizer

from spade_lens import Model, Prompt, load
from spade_lens.icl.vector_files import load_vectors, save_vectors
from spade_lens.icl.vectors import (
    arrow_vectors,
    demonstration_labels,
    rule_vectors,
    task_vector,
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


def test_vectors_are_the_residuals_at_labels_and_arrow(prompts: list[Prompt]) -> None:
    hf_model = tiny("llama")
    model = load(hf_model, tokenizer=tiny_tokenizer())
    rules, arrows = rule_vectors(model, prompts), arrow_vectors(model, prompts, layers=[1, 3])
    assert rules.shape == (5, 6, 4, 32)
    for i, prompt in enumerate(prompts):
        stream = torch.stack(hidden_states(hf_model, prompt.tokens))
        for j, position in enumerate(prompt.spans["labels"]):
            torch.testing.assert_close(rules[:, i, j], stream[:, position], **EXACT)
        torch.testing.assert_close(arrows[:, i], stream[[1, 3], -1], **EXACT)
    torch.testing.assert_close(task_vector(arrows), arrows.mean(dim=1))


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
    arrows = vectors[:, :, 0]
    torch.testing.assert_close(mean_of_others(arrows, groups), others[:, :, 0], **EXACT)


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
    vectors = torch.randn(5, 2, 32)
    path = save_vectors(tmp_path / "new" / "v.safetensors", vectors, tiny_llama, task="t", seed=3)
    found, about = load_vectors(path, tiny_llama)
    assert torch.equal(found, vectors) and about == {"task": "t", "seed": 3}
    other = load(tiny("qwen2"), tokenizer=tiny_tokenizer(), name="other")
    with pytest.raises(ValueError, match="belongs to 'tiny-llama'.*was given 'other'"):
        load_vectors(path, other)
    kept = path.read_bytes()
    save_vectors(path, vectors + 1, tiny_llama)
    path.write_bytes(kept)
    with pytest.raises(ValueError, match="not the file that the JSON beside it"):
        load_vectors(path, tiny_llama)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no v.safetensors"):
        load_vectors(path, tiny_llama)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save_vectors(tmp_path / "v.pt", vectors, tiny_llama)


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
