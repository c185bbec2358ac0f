"""Settings of the site: `make docs` builds it into docs/_build/html."""

import os
import re
from pathlib import Path
from typing import Any

import smoothdiag

# Set before the notebook's kernel starts: its figures go into the page, and small networks only wait on threads.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "smoothdiag"
author = "The smoothdiag authors"
version = release = smoothdiag.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"smoothdiag {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 4

# Never from a cache: what the notebook shows is what this version prints.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Units", "notes_style"), ("Source", "notes_style")]
default_role = "code"
add_module_names = False
python_use_unqualified_type_names = True

# The page of the benchmarks lies beside its scripts, and the site shows it as one of its own.
OUTSIDE = {"../benchmarks/README.md": "benchmarks.md", "../CHANGELOG.md": "changelog.md"}
UP = re.compile(rf"\]\((?P<up>(?:\.\./)*)(?P<path>{'|'.join(map(re.escape, OUTSIDE))})")
MARKS = re.compile(r"\||(?<=_)\*|(?<=[\s(,])\*(?=\w)")
"""What mathematics writes and reStructuredText would obey: ||g||, ||g||_*, (rows, *shape)."""


def with_pages_of_the_site(app: Any, page: str, source: list[str]) -> None:
    """Makes links that lead out of docs/ lead to the pages that show those files here."""
    source[0] = UP.sub(lambda found: f"]({found['up']}{OUTSIDE[found['path']]}", source[0])


def as_restructured_text(app: Any, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Escapes what docstrings mean as mathematics and reStructuredText reads as markup, such as ||g||."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        escaped = (part if place % 2 else MARKS.sub(r"\\\g<0>", part) for place, part in enumerate(parts))
        lines[number] = "".join(escaped)


def setup(app: Any) -> None:
    """Connects the two changes above."""
    app.connect("source-read", with_pages_of_the_site)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
