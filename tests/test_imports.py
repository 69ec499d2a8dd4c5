"""Imports point one way, and each outside library stays where it belongs. Late imports count too.

A module may import from its own level and from those above it in this table, and never in a circle. A new module must
be entered here: that is the moment to ask where it belongs.
"""

import ast
import sys
from pathlib import Path

import pytest

LEVELS = [
    {"hypernet"},  # the legend and the version
    {
        "hypernet.kernels.lora_delta.plan",
        "hypernet.kernels.lora_delta.reference",
        "hypernet.kernels.lora_delta.kernels",
        "hypernet.kernels.lora_delta.op",
        "hypernet.kernels.lora_delta.cost",
        "hypernet.kernels.lora_delta.budget",
        "hypernet.kernels.lora_delta",
        "hypernet.adapter",
        "hypernet.arguments",
        "hypernet.attention",
        "hypernet.base_model",
        "hypernet.chunking",
        "hypernet.decorrelation",
        "hypernet.documents",
        "hypernet.files",
        "hypernet.metrics",
        "hypernet.muon",
        "hypernet.perceiver",
        "hypernet.pooling",
        "hypernet.targets",
        "hypernet.timing",
        "hypernet.data",
        "hypernet.data.records",
    },
    {
        "hypernet.context_encoder",
        "hypernet.composition",
        "hypernet.injection",
        "hypernet.library",
        "hypernet.lora_head",
        "hypernet.merging",
        "hypernet.objectives",
        "hypernet.outer_product",
        "hypernet.packed_attention",
        "hypernet.vllm_export",
        "hypernet.data.collate",
        "hypernet.data.curriculum",
        "hypernet.data.datamodule",
        "hypernet.data.encyclopedia",
        "hypernet.data.needles",
        "hypernet.data.qa",
        "hypernet.data.self_study",
        "hypernet.data.sources",
        "hypernet.data.splitting",
    },
    {"hypernet.hypernetwork", "hypernet.routing"},
    {"hypernet.published", "hypernet.streaming"},
    {"hypernet.checkpoint", "hypernet.doc_to_lora"},
    {"hypernet.callbacks", "hypernet.checkpoint_io", "hypernet.lit_module", "hypernet.sharding"},
    {"hypernet.training"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
LIGHTNING = {
    "hypernet.callbacks",
    "hypernet.checkpoint_io",
    "hypernet.data.datamodule",
    "hypernet.lit_module",
    "hypernet.sharding",
}
NEVER_IN_THE_LIBRARY = {"hydra", "omegaconf", "wandb", "benchmarks", "train", "generate_adapter"}
IN_KERNELS = {"torch", "triton"} | sys.stdlib_module_names

ROOT = Path(__file__).parents[1]


def name_of(path: Path) -> str:
    """Module name of a file; those in kernels/ are imported through the link hypernet/kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("hypernet", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# rglob does not follow the link, so each file comes once.
FILES = {name_of(path): path for folder in ("hypernet", "kernels") for path in (ROOT / folder).rglob("*.py")}
FILES = {
    name: path for name, path in FILES.items() if not name.startswith("hypernet.kernels") or "kernels" in path.parts
}


def imports_of(name: str) -> set[str]:
    """Everything a module imports, anywhere in it; our own modules by their full names."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(filter(None, [base if node.level else "", node.module]))
            for alias in node.names:
                # `from package import module` imports the module, `from module import name` does not.
                full = f"{module}.{alias.name}"
                found.add(full if full in FILES else module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            pytest.fail(f"{name} imports by a computed name in line {node.lineno}; write an import statement.")
    return found - {"__future__"}


def ours(name: str) -> set[str]:
    return {found for found in imports_of(name) if found.split(".")[0] in ("hypernet", "kernels")} - {name}


def test_every_module_is_in_the_table_and_the_table_names_no_other():
    assert sum(map(len, LEVELS)) == len(LEVEL_OF)
    assert set(FILES) - set(LEVEL_OF) == set(), "enter these into LEVELS at the top of this file"
    assert set(LEVEL_OF) - set(FILES) == set(), "these are gone: take them out of LEVELS"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_nothing_from_a_higher_level(name):
    upward = {found for found in ours(name) if LEVEL_OF[found] > LEVEL_OF[name]}
    assert not upward


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for found in ours(name):
                visit(found, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(FILES))
def test_outside_libraries_stay_where_they_belong(name):
    outside = {found.split(".")[0] for found in imports_of(name)}
    assert not outside & NEVER_IN_THE_LIBRARY
    assert name in LIGHTNING or not outside & {"lightning", "pytorch_lightning", "lightning_fabric"}
    if name.startswith("hypernet.kernels"):
        assert outside - {"hypernet"} <= IN_KERNELS
        assert all(found.startswith("hypernet.kernels") for found in ours(name))


def test_modules_that_may_use_lightning_do():
    assert {name for name in FILES if {found.split(".")[0] for found in imports_of(name)} & {"lightning"}} == LIGHTNING


def test_late_and_relative_imports_are_seen(tmp_path, monkeypatch):
    path = tmp_path / "op.py"
    path.write_text("def f():\n    import wandb.sdk\n    from .plan import Plan\n    from .. import lora_delta\n")
    monkeypatch.setitem(FILES, "hypernet.kernels.lora_delta.op", path)
    found = imports_of("hypernet.kernels.lora_delta.op")
    assert found == {"wandb.sdk", "hypernet.kernels.lora_delta.plan", "hypernet.kernels.lora_delta"}
