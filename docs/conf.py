"""The site of these pages: `sphinx-build -W docs build/site`. README.md of the project is its first page."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import llm2vec_gen_jax  # noqa: E402

project = "llm2vec_gen_jax"
author = copyright = "The llm2vec_gen_jax authors"
version = release = llm2vec_gen_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "index"
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"show_navbar_depth": 1, "use_download_button": False, "navbar_persistent": []}

myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # files outside docs/, which remain text; test_docs.py checks links
highlight_language = "bash"  # of indented blocks
default_role = "literal"  # `name` in docstrings, as in Markdown
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_mock_imports = ["langchain_core", "llama_index", "mteb", "sentence_transformers"]


def setup(app):
    """In the list of all pages, links to the project's README lead to the first page, which includes it."""
    app.connect("source-read", lambda app, name, source: _link_first_page(source))


def _link_first_page(source):
    source[0] = source[0].replace("](../README.md)", "](index.md)")
