"""A small table of answers that are right or wrong, for tests of summaries and their tables."""

import pandas as pd


def graded_frame() -> pd.DataFrame:
    """Two tasks, two lenses, three layers, four prompts; the third layer is the model's own."""
    correct = {
        ("easy", "a"): ["0000", "1100", "1110"],
        ("easy", "b"): ["1000", "1110", "1110"],
        ("hard", "a"): ["0000", "0000", "1000"],
        ("hard", "b"): ["0000", "1000", "1000"],
    }
    rows = [
        {"task": task, "model": "m", "lens": lens, "layer": layer, "prompt": prompt}
        | {"correct": digit == "1", "agrees": layer == 2 or (lens == "b" and prompt < 3)}
        for (task, lens), layers in correct.items()
        for layer, digits in enumerate(layers)
        for prompt, digit in enumerate(digits)
    ]
    return pd.DataFrame(rows)
