"""The columns of all tables, in one place: one word for one thing.

This module knows nothing but words. Tests hold every table of the library against it.
"""

from types import MappingProxyType

COLUMNS = MappingProxyType(
    {
        # what a row is about
        "model": "name of the model",
        "task": "name of the task",
        "prompt": "number of the prompt, from 0",
        "position": "position in the prompt, from 0",
        "layer": "layer: the residual stream after so many blocks; 0 is the embedding",
        "block": "block, from 0: between layer and layer + 1",
        "head": "attention head of a block, from 0",
        "lens": "name of the lens",
        "keep": "name of the keep set that SPADE answers with",
        "check": "name of the confidence that an exit is decided by",
        "policy": "name of the exit policy",
        "condition": "what was patched",
        "shots": "number of demonstrations",
        "demo": "number of the demonstration, from 0",
        "seed": "seed of what was drawn",
        # what was read
        "target": "the right next token, as text",
        "target_id": "its token id",
        "correct": "whether the target is the top token of the whole vocabulary",
        "prefers": "whether the target is preferred to all other candidates",
        "logit_diff": "the target's logit minus the highest of the other candidates",
        "agrees": "whether the top token is the model's own",
        "entropy": "entropy over the vocabulary, in nats",
        "kl": "KL(model || lens), in nats",
        # what was summarised
        "measure": "which measure the mean is of: accuracy, agreement, logit_diff, ...",
        "mean": "mean over prompts",
        "low": "lower end of the interval",
        "high": "upper end of the interval",
        "n": "number of prompts",
        "accuracy": "fraction of prompts answered right",
        "agreement": "fraction of prompts answered as the model does",
    }
)
