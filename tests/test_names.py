"""One name, one thing: no public class, constant or type alias is defined in two modules of the library."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def public_names(source: str) -> Iterator[str]:
    """Capitalised names without an underscore in front that a module defines at its top level."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            found = []
        yield from (name for name in found if name[0].isupper())


def test_no_public_name_is_defined_in_two_modules():
    # rglob does not follow the link hypernet/kernels, so each file comes once.
    modules = defaultdict(set)
    for folder in ("hypernet", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in public_names(path.read_text(encoding="utf-8")):
                modules[name].add(str(path.relative_to(ROOT)))
    assert len(modules) > 100
    assert {name: sorted(where) for name, where in modules.items() if len(where) > 1} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class Record: ...", ["Record"]),
        ("KINDS: tuple[str, ...] = ('a',)", ["KINDS"]),
        ("A, B = 1, 2\nC = D = 3", ["A", "B", "C", "D"]),
        ("Weights = dict[str, int]", ["Weights"]),
        ("_KINDS = log = 1\nclass _Record: ...\ndef f(): K = 1", []),
    ],
)
def test_public_names_are_classes_constants_and_aliases(source, expected):
    assert list(public_names(source)) == expected
