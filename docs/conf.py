"""How the site is built: `make docs`. What of it is made from the code stands in `generated.py`, beside this file."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "Tailored-LLaMA"
release = metadata.version("tailored-llama")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
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
