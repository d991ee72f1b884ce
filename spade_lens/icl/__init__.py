"""In-context learning: tasks and k-shot prompts that know where every piece stands."""

from spade_lens.few_shot import Template, few_shot_prompt
from spade_lens.icl.decisions import pair_decisions
from spade_lens.icl.word_pairs import WordPairTask, task, task_names

__all__ = ["Template", "WordPairTask", "few_shot_prompt", "pair_decisions", "task", "task_names"]
