"""What it costs to import the library and to ask the command line for help, in CPU seconds.

Measured in child processes and as ratios to ``import torch``, so that a slow machine is no failure.
"""

import os
import subprocess
import sys

RUNS = 3


def cpu_seconds(code: str) -> float:
    """The CPU seconds of a fresh Python that runs the code: the least of a few runs."""
    return min(_once(code) for _ in range(RUNS))


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
    torch = cpu_seconds("import torch")
    assert cpu_seconds("import spade_lens") <= 1.3 * torch
    for flag in ("--help", "--version"):
        command = f"import sys; from spade_lens.cli import main; sys.argv[1:] = [{flag!r}]; main()"
        assert cpu_seconds(command) < min(torch, 1.0)
    heavy = "torch", "pandas", "matplotlib", "transformers"
    assert (
        cpu_seconds(
            f"import sys, spade_lens, spade_lens.cli\nassert not {{*sys.modules}} & {{*{heavy!r}}}"
        )
        < torch
    )
