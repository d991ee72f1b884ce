"""Prompts: tokens with known positions, made of text, chats or demonstrations.

This room knows tokenizers and nothing of models.
"""

from spade_lens.prompts.few_shot import Template, few_shot_prompt
from spade_lens.prompts.prompt import Prompt

__all__ = ["Prompt", "Template", "few_shot_prompt"]
