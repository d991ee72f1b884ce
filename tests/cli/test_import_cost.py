"""What it costs to import the library and to ask the command line for help, in CPU seconds.

Measured in child processes and as ratios to ``import torch``, so that a slow machine is no failure.
"""

import os
import subprocess
import sys

RUNS = 3


def takes(code: str, most: float) -> bool:
    """Whether a fresh Python runs the code in so many CPU seconds, at best of a few runs."""
    return any(_once(code) <= most for _ in range(RUNS))


def _once(code: str) -> float:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, code
    return usage.ru_utime + usage.ru_stime


def test_import_and_help_are_cheap() -> None:
    torch = min(_once("import torch") for _ in range(RUNS))
    assert takes("import spade_lens", 1.3 * torch)
    for flag in ("--help", "--version"):
        command = f"import sys; from spade_lens.cli import main; sys.argv[1:] = [{flag!r}]; main()"
        assert takes(command, min(torch, 1.0))
    heavy = "torch", "pandas", "matplotlib", "transformers"
    code = f"import sys, spade_lens, spade_lens.cli\nassert not {{*sys.modules}} & {{*{heavy!r}}}"
    assert takes(code, torch)
