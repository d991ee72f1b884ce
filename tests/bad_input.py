"""Call every public function with bad input, in a plain process, and print what it says as JSON.

The test suite checks annotations over the whole package, so there a wrong type never reaches the
library's own checks. Users have no such net: this script runs without it.
"""

import json
import linecache
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny, tiny_tokenizer

import spade_lens as sl


class Nonsense:
    """What no function expects."""

    def __repr__(self) -> str:
        return "Nonsense()"


NONSENSE = Nonsense()


def calls(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A valid call of every public function, by its public name; filled in by room below."""
    return {
        "read": (
            sl.read,
            dict(prompts="ab", lens="logit", model=model, layers=1, positions="last"),
        ),
        "capture": (sl.capture, dict(model=model, prompts="ab", layers=1, positions="last")),
    }


WRONG: dict[str, list[Any]] = {
    "prompts": [NONSENSE, 3, [], "", [3], [["ab"]], {"role": "user"}, [1, 2], [None]],
    "lens": [NONSENSE, "lgit", [], [3], ["logit", "logit"]],
    "model": [NONSENSE, "smollm2"],
    "layers": [NONSENSE, 99, -1, "3", 1.5, True, [], [1, 99], [None]],
    "positions": [NONSENSE, 99, -99, "frist", 1.5, [[0], [0]], [99], [None]],
    "patches": [NONSENSE, [NONSENSE], [sl.Patch(99, 0, 0, values=torch.zeros(32))]],
    "top_k": [0, -1, NONSENSE, 1.5],
    "settings": [NONSENSE, 4],
}


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a function; say what it raised, and whether one of our own ``raise`` lines did."""
    try:
        function(**arguments)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        ours = "spade_lens" in frames[-1].filename and line.startswith("raise")
        return {
            "kind": type(error).__name__,
            "message": str(error),
            "ours": ours,
            "where": f"{frames[-1].filename}:{frames[-1].lineno}: {line}",
        }
    return {"kind": None, "message": "nothing was raised", "ours": False, "where": ""}


def main() -> None:
    """Print one JSON object: case -> what was said, and whether the model ran."""
    sl.Settings(progress=False).__enter__()
    model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer(), name="tiny-llama")
    report: dict[str, Any] = {}
    runs = 0
    run_blocks = sl.Model.run_blocks

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return run_blocks(*args, **kwargs)

    sl.Model.run_blocks = counted  # type: ignore[method-assign]
    table = calls(model)
    for name, (function, valid) in table.items():
        function(**valid)  # a call that is not valid proves nothing
        for parameter in valid | {k: None for k in ("settings",)}:
            for wrong in WRONG.get(parameter, [NONSENSE]):
                runs = 0
                said = attempt(function, valid | {parameter: wrong})
                report[f"{name}({parameter}={wrong!r})"] = said | {"runs": runs}
    json.dump({"functions": sorted(table), "cases": report}, sys.stdout)


if __name__ == "__main__":
    main()
