"""Vectors written into dummy prompts, and what each demonstration contributes."""
