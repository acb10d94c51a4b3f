"""The fenced blocks of docs/coming-from/.

`python tests/rows/snippets.py FOLDER` writes the Python ones there, each as a program: ci/lint checks their types.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

PAGES = sorted((Path(__file__).resolve().parent.parent.parent / "docs" / "coming-from").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    name: str  # page and number
    language: str
    text: str


def snippets(*languages: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        for number, block in enumerate(_FENCE.finditer(page.read_text("utf-8")), 1):
            if not languages or block[1] in languages:
                found.append(Snippet(f"{page.stem}-{number}", block[1], block[2]))
    return found


def program(snippet: Snippet) -> str:
    """As a module: what is awaited at the top of a snippet is awaited in a function."""
    return f"async def main() -> None:\n{textwrap.indent(snippet.text, '    ')}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in snippets("python"):
        (folder / f"{each.name.replace('-', '_')}.py").write_text(program(each), "utf-8")
