"""Sphinx's settings. Nothing here reaches for the network: `make docs` works offline."""

import importlib.metadata
import os
import shutil
import warnings
from pathlib import Path

project = "spade_lens"
author = copyright = "the spade_lens developers"
release = importlib.metadata.version("spade-lens")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",  # after napoleon, whose Args it completes
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"spade_lens {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # left to sphinx_autodoc_typehints
always_use_bars_union = True
# transformers guards imports of packages that it can do without, and so can these pages.
suppress_warnings = ["sphinx_autodoc_typehints.guarded_import"]

# Its own business with the next Sphinx, told once for every signature.
warnings.filterwarnings("ignore", message=".*_RstSnippetParser.set_application")

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs; `make notebooks` runs them

# Links into the pages of torch and its like need those pages' indexes, so only when asked for.
if os.environ.get("SPADE_LENS_DOCS_LINKS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
    }

# Sphinx reads only what lies below docs/, so the notebooks next door are copied in at each build.
_here = Path(__file__).parent
shutil.rmtree(_here / "notebooks", ignore_errors=True)
(_here / "notebooks").mkdir()
for _notebook in sorted((_here.parent / "notebooks").glob("*.ipynb")):
    shutil.copy2(_notebook, _here / "notebooks")
