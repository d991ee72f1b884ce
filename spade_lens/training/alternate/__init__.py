"""Alternate supervised fine-tuning and preference training, with or without a penalty between them.

Source: Wang et al., Hybrid Alignment Training (Hbat, arXiv 2406.15178). What we take from it: data
in N splits, a phase of SFT and a phase of preference training on each, and the modified elastic
weight consolidation (EWC) of :mod:`~spade_lens.training.alternate.importance`. Preference training
is DPO (Rafailov et al., arXiv 2305.18290), with the model at the start of the phase as reference.
Ours: low-rank updates of the last blocks in place of all weights, and residuals below these blocks
that are computed once.

The loop is that of :func:`spade_lens.training.train`, not that of peft and trl. It goes on after a
stop with the very numbers of an unbroken run, it runs only the blocks that are trained, and it adds
no dependency. Having both would mean two sets of numbers to explain.
"""
