"""Floor 5: results as one HTML page to look into, in a notebook or a browser.

This room knows tables and their columns, not what made them. A page asks no network: its script,
its style and its data stand in it. Results offer it as ``save_html``.
"""

from spade_lens.view.page import html

__all__ = ["html"]
