"""Floor 4: text after a prompt, token by token: plain, after an exit, or drafted and verified.

Nothing here knows of tasks or plots. The verb is :func:`spade_lens.generate`.
"""

from spade_lens.generation import heuristics
from spade_lens.generation.comparison import compare
from spade_lens.generation.deal import Deal
from spade_lens.generation.drafters import LayerExit, PromptLookup
from spade_lens.generation.exit_prefill import ExitPrefill
from spade_lens.generation.generated import Generated
from spade_lens.generation.kangaroo import Kangaroo, load_kangaroo
from spade_lens.generation.sampling import Sampling
from spade_lens.generation.scoring import score_text
from spade_lens.generation.shortcuts import Shortcuts, fit_shortcuts, load_shortcuts
from spade_lens.generation.speculate import Speculate
from spade_lens.generation.token_exit import TokenExit
from spade_lens.generation.whole_answers import score_answers

__all__ = [
    "Deal",
    "ExitPrefill",
    "Generated",
    "Kangaroo",
    "LayerExit",
    "PromptLookup",
    "Sampling",
    "Shortcuts",
    "Speculate",
    "TokenExit",
    "compare",
    "fit_shortcuts",
    "heuristics",
    "load_kangaroo",
    "load_shortcuts",
    "score_answers",
    "score_text",
]
