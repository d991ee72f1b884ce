"""Tables for the tests of pages: made numbers, and tokens that are no friend of HTML."""

import numpy as np
import pandas as pd

HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "</style><b>",
    "<!--",
    "&lt;",
    "\u202eabc",
    "\x1b[31mred",
    "a\nb",
    "\x00",
    "\u200b",
    "x" * 10_000,
    "שלום",
    "'\"`${1}\\",
]


def made_readout(lenses: int, layers: int, positions: int, k: int = 3) -> pd.DataFrame:
    """The table of a readout of one text, with every number different from its neighbours."""
    rng = np.random.default_rng(0)
    names = ["logit lens", "SPADE", "tuned lens", "L-SPADE"][:lenses]
    lens, layer, position = (
        axis.ravel() for axis in np.meshgrid(names, range(layers), range(positions), indexing="ij")
    )
    n = len(lens)
    frame = pd.DataFrame(
        {
            "model": "made",
            "lens": lens,
            "layer": layer,
            "prompt": 0,
            "position": position,
            "entropy": rng.gamma(2, 2, n),
            "agrees": rng.random(n) < 0.3,
            "kl": rng.gamma(2, 1, n),
        }
    )
    logprobs = np.sort(-rng.gamma(1.5, 2.0, (n, k)), axis=-1)[:, ::-1]
    for i in range(k):
        frame[f"top_{i + 1}"] = [f" w{word}" for word in rng.integers(0, 500, n)]
        frame[f"top_{i + 1}_logprob"] = logprobs[:, i]
    frame["target"] = [f" t{p}" for p in position]
    frame["target_rank"] = rng.integers(0, 40_000, n)
    frame["target_logprob"] = -rng.gamma(2, 2, n)
    return frame


def hostile_readout() -> pd.DataFrame:
    """A readout in which every text that may come from a tokenizer or a user is hostile."""
    n = len(HOSTILE)
    frame = made_readout(2, 3, n, k=2)
    frame["model"] = "<i>model</i>"
    frame["lens"] = frame["lens"].replace("logit lens", "</title><script>window.hacked=1</script>")
    for shift, column in enumerate(("top_1", "top_2", "target")):
        frame[column] = [HOSTILE[(p + shift) % n] for p in frame["position"]]
    return frame
