"""Prompts: tokens with known positions, made of text, chats or demonstrations.

This room knows tokenizers and nothing of models.
"""

from spade_lens.prompts.few_shot import Template, few_shot_prompt
from spade_lens.prompts.prompt import Prompt, TokenWarning

__all__ = ["Prompt", "Template", "TokenWarning", "few_shot_prompt"]
