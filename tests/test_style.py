"""The names of tests: what is tested and what it does, short enough to be read in a list."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MAX_CHARACTERS = 60


def long_names(source: str) -> list[str]:
    """Tests of a file, methods of classes included, whose name has more than MAX_CHARACTERS."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if f.name.startswith("test_") and len(f.name) > MAX_CHARACTERS]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_test_names_have_at_most_60_characters(path: Path) -> None:
    names = long_names(path.read_text(encoding="utf-8"))
    assert not names, f"Say unit and property in at most {MAX_CHARACTERS} characters: {', '.join(names)}"


def test_long_test_name_is_found_in_functions_and_classes() -> None:
    fits, long = "test_" + 55 * "x", "test_" + 56 * "x"
    functions = f"def {fits}(): pass\ndef {long}(): pass\ndef {long[1:]}(): pass\n"
    assert long_names(functions + f"class TestA:\n    def {long}y(self): pass") == [long, long + "y"]
