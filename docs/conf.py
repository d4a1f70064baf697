"""Sphinx's configuration of the documentation site; `make docs` builds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lora_kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["_ext"]
smartquotes = False  # quotation marks are code: residual="implicit"

html_theme = "furo"
html_title = project
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4
default_role = "code-or-link"  # `code` in docstrings
highlight_language = "none"  # a block without a language is output

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
