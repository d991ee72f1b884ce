"""The columns of all tables, in one place: one word for one thing.

This module knows nothing but words. Tests hold every table of the library against it.
"""

from types import MappingProxyType

KEYS = (
    "model",
    "task",
    "condition",
    "edges",
    "control",
    "start",
    "stop",
    "method",
    "flow",
    "of",
    "lens",
    "keep",
    "check",
    "policy",
    "shots",
    "block",
    "head",
    "layer",
)
"""Columns that name a group of rows, from the widest to the narrowest: what a summary is by."""

MEASURES = MappingProxyType(
    {
        "correct": "accuracy",
        "agrees": "agreement",
        "prefers": "preference",
        "flips": "flips",
        "logit_diff": "logit_diff",
        "change": "change",
        "effect": "effect",
        "saliency": "saliency",
        "effective": "effective",
    }
)
"""Columns with one value per prompt that are worth a mean, and what the mean is called."""

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
        "token": "the token at the position, as text",
        "token_id": "its token id",
        "norm": "Euclidean norm of the residual",
        "target": "the right next token, as text",
        "target_id": "its token id",
        "correct": "whether the target is the top token of the whole vocabulary",
        "prefers": "whether the target is preferred to all other candidates",
        "target_logit": "the target's logit",
        "logit_diff": "the target's logit minus the highest of the other candidates",
        "agrees": "whether the top token is the model's own",
        "entropy": "entropy over the vocabulary, in nats",
        "kl": "KL(model || lens), in nats",
        # early exit
        "answer": "the answer, as text: the top token, or the top candidate of prompts with such",
        "answer_id": "its token id",
        "among": "what answers are chosen from: the vocabulary, or the prompt's candidates",
        "check_answer": "what the check's own readout answers, as text",
        "check_answer_id": "its token id",
        "exit_answer": "what a prompt that exits here answers, as text",
        "exit_answer_id": "its token id",
        "final_answer": "what the full model answers, as text",
        "final_answer_id": "its token id",
        "confidence": "confidence of the check; larger is surer",
        "exit_layer": "layer at which the prompt left; in a summary the mean over prompts",
        "early": "whether the prompt left early; in a summary the fraction of prompts",
        "length": "number of tokens of the prompt",
        "kept": "number of tokens that the keep set keeps",
        "checks": "number of checks made",
        "layer_tokens": "tokens times blocks run, checks and answer included",
        "flops_blocks": "FLOPs of the blocks up to the layer, on all tokens of the prompt",
        "flops_check": "FLOPs of one check, unembedding included",
        "flops_checks": "FLOPs of all checks made",
        "flops_answer": "FLOPs of the answer: the remaining blocks on kept tokens, and unembedding",
        "flops_padding": "FLOPs spent on padding",
        "flops": "FLOPs of blocks, checks and answer, without padding",
        "full_flops": "FLOPs of the full model, without padding",
        "seconds": "wall-clock time, in seconds",
        "family": "family of exit policies",
        "compute": "FLOPs over the full model's",
        "speedup": "the full model's FLOPs over the FLOPs spent",
        "loss": "the full model's accuracy (or agreement) minus this one's",
        "lost": "fraction of prompts whose right answer was given up",
        "event": "what the confidence is held to predict",
        "bin": "number of the bin of confidences, from 0",
        "frequency": "how often the event happened in the bin",
        "ece": "expected calibration error",
        "budget": "the compute allowed",
        "iso_compute": "accuracy at equal compute: mean over the budgets all families can meet",
        "wanted": "the loss allowed when the policy was chosen; NaN for best accuracy",
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
