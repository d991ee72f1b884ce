"""Peak memory of the grid beyond the loaded model, in a process of its own (Linux only).

Called by speed.py: ``python benchmarks/memory.py MODEL N_TOKENS`` prints bytes.
"""

import ctypes
import re
import sys
from pathlib import Path

import torch
from subjects import random_prompt

import spade_lens as sl
from spade_lens import Settings

_STATUS = Path("/proc/self/status")


def main() -> None:
    source, n_tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(2)
    model = sl.load(source)
    lens = sl.Spade(model)
    # Buffers that are made once, whatever the text's length, are not the grid's.
    sl.read(
        random_prompt(model, 4), lens, positions="all", top_k=1, settings=Settings(progress=False)
    )
    # Freed memory that the C library still holds would be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident
    sl.read(
        random_prompt(model, n_tokens),
        lens,
        positions="all",
        top_k=1,
        settings=Settings(progress=False),
    )
    print(_resident("VmHWM") - before)


def _resident(which: str) -> int:
    found = re.search(rf"^{which}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
