"""Nothing expensive is imported before it is needed."""

import subprocess
import sys

HEAVY = ("transformer_lens", "transformers", "pandas", "scipy", "sklearn", "datasets", "matplotlib")


STEPS = (
    "import spade_lens",
    "spade_lens.tensors.random_like",
    "import spade_lens as sl; sl.load, sl.Model, sl.Patch, sl.catalog",
    "spade_lens.prompts, spade_lens.storage, spade_lens.replay",
    "spade_lens.tasks",
)


def test_rooms_are_light() -> None:
    """One process takes the steps: what none of them has imported, no step imports alone."""
    code = f"""
import sys
for step in {STEPS!r}:
    exec(step)
    print(step, [m for m in {HEAVY!r} if m in sys.modules])
sl.read, sl.fit
print("before a model is loaded", [m for m in ("transformers",) if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{s} []" for s in (*STEPS, "before a model is loaded")]


def test_log_levels_and_warnings_of_other_libraries_stay_as_they_were() -> None:
    """TransformerLens silences transformers for the whole process when it is imported."""
    code = """
import logging, warnings, transformers as hf

def state():
    levels = [logging.getLogger(name).level for name in ("", "transformers")]
    silenced = [str(f[1]) for f in warnings.filters if "generation flags" in str(f[1])]
    return hf.logging.get_verbosity(), levels, silenced

before = state()
import spade_lens.models.sources
assert state() == before, (before, state())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
