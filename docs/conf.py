"""Sphinx's settings. Nothing here reaches for the network: `make docs` works offline."""

import importlib.metadata
import inspect
import os
import shutil
import sys
import warnings
from pathlib import Path

from docutils import nodes
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
import reference

project = "spade_lens"
author = copyright = "the spade_lens developers"
release = importlib.metadata.version("spade-lens")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",  # after napoleon, whose Args it completes
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"spade_lens {release}"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"no-value": True}  # the signature has them already
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
reference.write()


class _Default:
    """A default too long for a signature: its name, or its type, or its first item."""

    def __init__(self, default):
        if isinstance(default, tuple | list) and len(repr(default[0])) < 40:
            self.text = f"({default[0]!r}, ...)"
        elif type(default).__module__.startswith("sphinx"):  # the source of a default
            self.text = "..."
        else:
            self.text = getattr(default, "__name__", f"{type(default).__name__}(...)")

    def __repr__(self):
        return self.text


def shorten_defaults(app, function, bound_method):
    """Keep long defaults out of signatures, such as a plan of twenty numbers."""
    if not inspect.isfunction(function):
        return
    signature = inspect.signature(function)
    parameters = [
        each.replace(default=_Default(each.default)) if len(repr(each.default)) > 60 else each
        for each in signature.parameters.values()
    ]
    if parameters != list(signature.parameters.values()):
        function.__signature__ = signature.replace(parameters=parameters)


def say_returned_type(app, what, name, obj, options, lines):
    """Make ``Returns:`` a field of its own, so that a colon in its sentence ends no type."""
    if "Returns:" not in lines:
        return
    start = lines.index("Returns:")
    if start + 1 < len(lines):
        lines[start : start + 2] = ["", f":returns: {lines[start + 1].strip()}"]


def find_object(app, env, node, contnode):
    """Link paths of every kind, such as ``sl.read`` and ``spade_lens.lenses.reading.read``."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target in [room.__name__ for room in reference.rooms()]:
        page = f"api/{reference.typed(target)}"
        return make_refnode(app.builder, node["refdoc"], page, "", contnode)
    found = reference.find(target) if target.split(".")[0] in ("sl", "spade_lens") else None
    if found is None:
        short = [path for path in reference.documented() if path.endswith(f".{target}")]
        if len(short) != 1:
            return None
        found = short[0], ""
    path, rest = found
    page = f"api/{reference.page(path)}"
    described = env.get_domain("py").objects
    anchor = path + rest if path + rest in described else path
    return make_refnode(app.builder, node["refdoc"], page, anchor, contnode, path + rest)


def type_short_path(app, domain, objtype, content):
    """Show ``sl.exits.Threshold``, which is what users type."""
    for signature in content.parent.findall(nodes.Element):
        if signature.tagname == "desc_addname":
            short = nodes.Text(reference.typed(signature.astext()))
            signature.clear()
            signature += short


def setup(app):
    app.connect("autodoc-before-process-signature", shorten_defaults, priority=900)
    app.connect("autodoc-process-docstring", say_returned_type, priority=100)
    app.connect("missing-reference", find_object)
    app.connect("object-description-transform", type_short_path)
