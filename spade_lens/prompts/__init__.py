"""Prompts."""

from spade_lens.prompts.few_shot import Template, few_shot_prompt
from spade_lens.prompts.prompt import Prompt

__all__ = [
    "Prompt",
    "Template",
    "few_shot_prompt",
]
