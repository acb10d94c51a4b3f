"""A class has one job, and a function can be read at a glance: what grows beyond the bounds is cut, or says why not.

The reason stands at its head, in a comment or the docstring, and begins with "Large because".
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent.parent / "src" / "fastkin"

CLASS_LINES = 350
CLASS_ATTRIBUTES = 25  # that are assigned to self
FUNCTION_LINES = 60
REASON = "Large because"
# Its functions follow the order in which AWS checks a call: cut apart, that order could not be seen.
LONG_FUNCTIONS = {"emulator"}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def head(node: Definition, lines: list[str]) -> str:
    """What is said of it before its first statement: comments above and below its first line, and the docstring."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    above = first - 1
    while above > 0 and lines[above - 1].lstrip().startswith("#"):
        above -= 1
    body = node.body[0]
    end = body.end_lineno if ast.get_docstring(node) is not None else body.lineno - 1
    return "\n".join(lines[above:end])


def attributes(node: ast.ClassDef) -> set[str]:
    """Names that its methods assign to `self`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def too_large(text: str, where: str, *, functions: bool = True) -> list[str]:
    """What is beyond the bounds in a module and gives no reason. `functions`: long functions count too."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, Definition):
            continue
        assert node.end_lineno is not None
        size = node.end_lineno - node.lineno + 1
        name = f"{where}:{node.lineno} {node.name}"
        problems = []
        if isinstance(node, ast.ClassDef):
            if size > CLASS_LINES:
                problems.append(f"{size} lines, at most {CLASS_LINES}")
            if (count := len(attributes(node))) > CLASS_ATTRIBUTES:
                problems.append(f"{count} attributes, at most {CLASS_ATTRIBUTES}")
        elif functions and size > FUNCTION_LINES:
            problems.append(f"{size} lines, at most {FUNCTION_LINES}")
        if problems and REASON not in head(node, lines):
            found.append(f"{name}: {'; '.join(problems)}")
    return found


def test_nothing_grows_large_without_a_reason() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        found += too_large(path.read_text(), str(where), functions=where.parts[0] not in LONG_FUNCTIONS)
    assert not found, f'cut it, or say why not ("{REASON} ..." at its head):\n' + "\n".join(found)


# -- the test itself ---------------------------------------------------------------------------------


def method(statements: int, said: str = '"""Does it."""') -> str:
    """Two lines and so many statements."""
    return f"    def work(self):\n        {said}\n" + "        self.now = 1\n" * statements


def test_a_class_is_measured_in_lines() -> None:
    fits = "class Fits:\n" + "    # why\n" * (CLASS_LINES - 2) + "    a = 1\n"
    assert not too_large(fits, "m.py")
    large = fits.replace("    a = 1\n", "    a = 1\n    b = 2\n")
    assert too_large(large, "m.py") == ["m.py:1 Fits: 351 lines, at most 350"]


def test_a_class_is_measured_in_attributes_of_all_its_methods() -> None:
    def sets(*names: str) -> str:
        return "".join(f"        self.{name} = self.other = 0\n" for name in names)

    one = "class Box:\n    def __init__(self):\n" + sets(*(f"a{n}" for n in range(20)))
    fits = one + "    def later(self):\n" + sets(*(f"b{n}" for n in range(4)))
    assert not too_large(fits, "m.py")
    many = fits + "        self.c = other.d = self.a1.e = 0\n"
    assert too_large(many, "m.py") == ["m.py:1 Box: 26 attributes, at most 25"]


def test_a_function_is_measured_wherever_it_stands() -> None:
    text = "class C:\n" + method(FUNCTION_LINES - 2)
    assert not too_large(text, "m.py")
    text += "        self.now = 2\n"
    assert too_large(text, "m.py") == ["m.py:2 work: 61 lines, at most 60"]
    assert too_large(text.replace("    def", "    async def"), "m.py") == ["m.py:2 work: 61 lines, at most 60"]
    assert not too_large(text, "m.py", functions=False)


def test_a_reason_counts_at_the_head_and_nowhere_else() -> None:
    long = FUNCTION_LINES
    above = "class C:\n    # Large because it is a table.\n    @cache\n" + method(long)
    docstring = "class C:\n" + method(long, '"""Does it.\n\n        Large because it is a table.\n        """')
    below = "class C:\n" + method(long, "# Large because it is a table.")
    for text in (above, docstring, below):
        assert not too_large(text, "m.py")
    end = "class C:\n" + method(long) + "        # Large because nobody looks here.\n        self.now = 3\n"
    before = "# Large because it is far away.\n\nclass C:\n" + method(long)
    for text in (end, before):
        assert len(too_large(text, "m.py")) == 1
