"""The tutorial as a notebook: `python -m support.notebook` makes docs/start.ipynb of docs/start.md.

Blocks of Python become cells that run; what wants a checkpoint from a hub stays text, as everything else does.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parents[2] / "docs"
PAGE, NOTEBOOK = DOCS / "start.md", DOCS / "start.ipynb"
SITE = "https://diffsparse.github.io/diffsparse/"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def notebook() -> str:
    """The text of the notebook."""
    parts = _BLOCK.split(_without_stubs(PAGE.read_text()))
    cells = []
    for number, part in enumerate(parts):
        make = new_code_cell if number % 2 else new_markdown_cell
        if part.strip():
            cells.append(make(_linked(part.strip()), id=f"cell-{number}"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return str(nbformat.writes(new_notebook(cells=cells, metadata=kernel))) + "\n"


def _without_stubs(text: str) -> str:
    """The page without its head and the sentence on the notebook, blocks that want a hub marked as text."""
    text = re.sub(r"\A---.*?---\n", "", text, flags=re.DOTALL).replace(
        " This page is also a [notebook](start.ipynb).", ""
    )
    return _BLOCK.sub(
        lambda block: block[0].replace("```python", "```py") if "from_pretrained" in block[1] else block[0], text
    )


def _linked(text: str) -> str:
    """With links to the site, since a notebook is opened anywhere."""
    return re.sub(
        r"\]\(([\w/-]+)\.md\)", lambda link: f"]({SITE}{link[1].removesuffix('index')}/)".replace("//)", "/)"), text
    )


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
