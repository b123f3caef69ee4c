"""The documentation site: `make docs`. Equations become MathML when the site is built, so no page needs a script or a network
for them."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

project = "ted_scale"
copyright = "the authors of ted_scale, Apache-2.0"
extensions = ["myst_parser"]
exclude_patterns = ["_site"]
nitpicky = True  # with -W a name that leads nowhere fails the build

myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_space = False
myst_heading_anchors = 4  # GitHub's anchors: a link works there and here

html_theme = "furo"
html_title = "ted_scale"
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_sourcelink = False


def inline(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode  # its text is written


def displayed(writer, node):
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
