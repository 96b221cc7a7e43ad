"""The site: every page of docs/, README.md as its first, and the reference from docstrings. ``make docs`` builds it."""

from __future__ import annotations

import pydoc
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes

import ddim_fast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project, author = "ddim_fast", "the ddim_fast authors"
copyright = "MIT licence"
release = version = ddim_fast.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["examples"]

# --- Pages ------------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/docs/test_notebooks.py runs them
nb_merge_streams = True

# --- The reference ----------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
nitpicky = True
KEPT: dict[str, list[str]] = {}


def keep(app, what, name, obj, options, lines):
    """Put a property's text aside, of which napoleon would take what stands before a colon for its type."""
    if what in ("attribute", "data", "property"):
        KEPT[name], lines[:] = list(lines), []


def put_back(app, what, name, obj, options, lines):
    lines[:] = KEPT.pop(name, lines)


def exists(name):
    """Whether an annotation's name is one: in a module of the package, or with its whole path."""
    first = name.split(".")[0]
    ours = [module for path, module in sys.modules.items() if path.split(".")[0] == "ddim_fast"]
    return any(hasattr(module, first) for module in ours) or pydoc.locate(name) is not None


def undocumented(app, env, node, contnode):
    """Show a type that exists, but has no entry here, as text: names that do not exist are errors."""
    name = node.get("reftarget", "").split("[")[0]  # of a container, the container
    return contnode if node.get("refdomain") == "py" and exists(name) else None


# --- How it looks: nothing is loaded from elsewhere -------------------------------------------------------------------

html_theme = "furo"
html_title = "ddim_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_use_index = False
html_copy_source = html_show_sourcelink = False

FROM_ROOT = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "security": "SECURITY.md",
}
"""Pages whose text stands in the repository's root."""


def from_root(app, docname, source):
    """Put a file of the root before what its page holds, with links as seen from docs/."""
    if docname in FROM_ROOT:
        text = (ROOT / FROM_ROOT[docname]).read_text(encoding="utf-8").replace("](docs/", "](")
        for page, file in FROM_ROOT.items():
            text = text.replace(f"]({file}", f"]({page}.md")
        source[0] = f"{text}\n\n{source[0]}"
    source[0] = source[0].replace("](../CONTRIBUTING.md", "](contributing.md")


def mathml(formula, display):
    return latex2mathml.converter.convert(formula, display=display)


def visit_math(self, node):
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self, node):
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", from_root)
    app.connect("autodoc-process-docstring", keep, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", put_back, priority=600)
    app.connect("missing-reference", undocumented)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
