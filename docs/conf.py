"""How the site is built: `make docs`. `generated.py` writes what of it is made from the code."""

import re
from importlib import metadata

from sphinx.application import Sphinx

project = "Tailored-LLaMA"
release = metadata.version("tailored-llama")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "index.md",
    *(f"{part}/**" for part in ("tutorials", "how-to", "reference", "explanation", "results")),
]

html_theme = "furo"
html_title = project
html_show_sourcelink = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # what `page.md#heading` finds, down to this level
nb_execution_mode = "off"  # the notebook is shown with the output that it was saved with

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the descriptions of the arguments say what they may be
default_role = "literal"
smartquotes = False  # settings are to be copied


def name_anchors(app: Sphinx, name: str, source: list[str]) -> None:
    """Let `page.md#anchor` find an anchor that is written as code hosts know it, on a line of its own."""
    source[0] = re.sub(r'^<a id="([\w-]+)"></a>$', r"(\1)=", source[0], flags=re.MULTILINE)


def setup(app: Sphinx) -> None:
    app.connect("source-read", name_anchors)
