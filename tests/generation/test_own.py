"""A strategy of a user's own, as the page on generating text has it, does what it says."""

import ast
import re
from pathlib import Path
from typing import Any

import torch

import spade_lens as sl

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def of_the_page(name: str) -> Any:
    """A class that the page defines."""
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        kinds = (ast.Import, ast.ClassDef)
        kept = [node for node in ast.parse(block).body if isinstance(node, kinds)]
        names = {"sl": sl}
        exec(compile(ast.Module(kept, []), str(PAGE), "exec"), names)
        if name in names:
            return names[name]
    raise AssertionError(f"the page has no {name}")


def test_the_pages_strategy_contrasts_two_layers(tiny_llama: sl.Model) -> None:
    contrast = of_the_page("Contrast")
    contrast.borders = (2,)
    prompts = tiny_llama.prompts(["abc", "hello"])
    written = sl.generate(prompts, 6, model=tiny_llama, stop=(), strategy=contrast())
    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        text = list(prompt.tokens)
        for token in tokens:
            residuals = sl.capture(
                tiny_llama, sl.Prompt(tokens=tuple(text)), layers=[2, 4], positions="last"
            )
            low, high = (tiny_llama.logits(residuals.layer(n))[0] for n in (2, 4))
            p, q = high.log_softmax(-1), low.log_softmax(-1)
            scores = torch.where(p.exp() < 0.1 * p.exp().max(), -torch.inf, p - q)
            assert token == int(scores.argmax())
            text.append(token)


def test_the_pages_drafter_changes_nothing(tiny_llama: sl.Model) -> None:
    drafter = of_the_page("Repeats")()
    strategy = sl.generation.Speculate([drafter])
    drafted = sl.generate("aaaa", 16, model=tiny_llama, stop=(), strategy=strategy)
    assert drafted.tokens == sl.generate("aaaa", 16, model=tiny_llama, stop=()).tokens
    assert int(drafted.rounds[:, 1].sum()) > 0
