"""The columns of all tables, in one place: one word for one thing.

This module knows nothing but words. Tests hold every table of the library against it, and a page
of the documentation lists it.
"""

from types import MappingProxyType

KEYS = (
    *("model", "task", "condition", "edges", "control", "start", "stop", "method", "flow", "of"),
    *("lens", "keep", "check", "policy", "shots", "block", "head", "layer"),
)
"""Columns that name a group of rows, from the widest to the narrowest: what a summary is by."""

MEASURES = MappingProxyType(
    {"correct": "accuracy", "agrees": "agreement", "prefers": "preference"}
    | {name: name for name in ("flips", "logit_diff", "change", "effect", "saliency", "effective")}
)
"""Columns with one value per prompt that are worth a mean, and what the mean is called."""

COLUMNS = MappingProxyType(
    {
        # what a row is about
        "model": "name of the model",
        "task": "name of the task",
        "prompt": "number of the prompt, from 0",
        "position": "position in the prompt, from 0",
        "token": "the token at the position, as text",
        "token_id": "id of the token at the position",
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
        "rule": "rule of the prompt",
        "label": "label of the demonstration",
        "label_id": "id of the label's token",
        "method": "what decodes a vector: SPADE, the logit lens, a patchscope",
        "draw": "number of the random draw of a control, from 0",
        "seed": "seed of the random draws",
        "control": "whether the row is of a control; for factors, the mean of the control",
        # what was read
        "target": "the right next token, as text",
        "target_id": "id of the target",
        "target_logprob": "log-probability of the target",
        "target_rank": "rank of the target in the vocabulary; 0 is the top",
        "choice": "the likeliest of the prompt's candidates, as text",
        "choice_id": "id of the choice",
        "correct": "whether the target is the top token: of the vocabulary, or as `among` says",
        "ambiguous": "whether the target's token also begins another answer, or the query",
        "prefers": "whether the target is preferred to all other candidates",
        "flips": "whether another candidate is preferred to the target",
        "target_logit": "the target's logit",
        "logit_diff": "the target's logit minus the highest of the other candidates",
        "agrees": "whether the top token is the model's own",
        "entropy": "entropy over the vocabulary, in nats",
        "kl": "KL(model || lens), in nats",
        "norm": "length of the vector",
        # how good a fitted lens is on held-out text
        "kl_to_model": "KL(model || lens), in nats, mean over positions",
        "agrees_with_model": "fraction of positions with the model's top token",
        "kl_to_spade": "KL(SPADE || lens), in nats, mean over positions",
        "agrees_with_spade": "fraction of positions with SPADE's top token",
        # in-context learning
        "edges": "family of attention edges that are cut",
        "start": "first layer of the window: blocks from here are cut",
        "stop": "layer at which the window ends",
        "cut": "number of edges that are cut",
        "change": "logit_diff minus that of the full model",
        "flow": "which pairs of tokens information flows between",
        "pairs": "number of pairs of tokens in the flow",
        "saliency": "saliency of an attention weight, mean over the flow's pairs",
        "effect": "how much of the answer the head alone restores",
        "same_label": "whether the demonstration's label is the right answer",
        "shapley": "Shapley value of the demonstration for the logit difference",
        "leave_one_out": "logit difference lost when the demonstration is left out",
        "add_one_in": "logit difference gained by the demonstration alone",
        "error": "standard error of a sampled Shapley value",
        "all": "logit difference with the vectors of all demonstrations",
        "none": "logit difference with the vectors of no demonstration",
        "effective": "effective number of contributing demonstrations",
        "of": "the set of positions that a row is of, or is a control of",
        "sufficient": "whether a sufficient set was found",
        "units": "number of pieces in the smallest set",
        "tokens": "number of tokens in the smallest set",
        "spans": "names of the pieces in the smallest set",
        "random": "fraction of random sets of that size that suffice",
        "comparison": "which vectors are compared: within a prompt, across rules, ...",
        "labels": "which pairs of labels: any, same, different",
        "chance": "accuracy of always naming the most frequent class",
        "factor": "what vectors vary with: rule, label, demo, their interactions, rest",
        "fraction": "fraction of the variance",
        "held_out": "the same, as far as two halves of the prompts agree on it",
        "value": "projection on the factor's first component",
        # generated text
        "strategy": "how text was made: plain, after an exit, or drafted and verified",
        "step": "number of the new token in its text, from 0",
        "logprob": "log-probability of the token, or of all tokens of the continuation, in nats",
        "accepted": "whether the token was drafted and accepted",
        "continuation": "the text whose log-probability is measured",
        "n_tokens": "number of tokens of the continuation",
        "greedy": "whether every token of the continuation is the likeliest at its place",
        # training
        "update": "number of updates of the weights so far",
        "train_loss": "training loss, mean since the row before",
        "validation_loss": "loss on held-out data, NaN without any",
        "learning_rate": "learning rate of AdamW",
        # early exit
        "answer": "the answer, as text: the top token, or the top candidate of prompts with such",
        "answer_id": "id of the answer",
        "among": "what answers are chosen from: the vocabulary, or the prompt's candidates",
        "check_answer": "what the check's own readout answers, as text",
        "check_answer_id": "id of the check's answer",
        "exit_answer": "what a prompt that exits here answers, as text",
        "exit_answer_id": "id of the exit's answer",
        "final_answer": "what the full model answers, as text",
        "final_answer_id": "id of the full model's answer",
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
        "gained": "fraction of prompts whose wrong answer was mended",
        "chosen_on": "what the row was chosen on: these prompts, or other prompts",
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
        "tasks": "number of tasks whose means the mean is of",
        "accuracy": "fraction of prompts answered right: over the vocabulary, or as `among` says",
        "agreement": "fraction of prompts answered as the model does",
    }
)

PATTERNS = MappingProxyType(
    {
        "top_<k>": "the k-th likeliest token, as text",
        "top_<k>_id": "id of the k-th likeliest token",
        "top_<k>_logprob": "log-probability of the k-th likeliest token",
        "candidate_<k>": "the prompt's k-th candidate, as text",
        "candidate_<k>_id": "id of the k-th candidate",
        "candidate_<k>_logprob": "log-probability of the k-th candidate",
        "<column>_low": "lower end of the column's interval",
        "<column>_high": "upper end of the column's interval",
        "calibration_<column>": "the column on the prompts that the policy was chosen on",
    }
)
"""Columns of which there are several: ``<k>`` is a number, ``<column>`` another column."""
