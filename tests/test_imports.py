"""Imports point one way, folder by folder, and each outside library stays where it belongs. Late imports count too.

A module may import from its own folder and from those before it in LAYERS, and never in a circle. A new folder must be
entered here: that is the moment to ask where it belongs.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import hypernet

LAYERS = (
    "kernels",
    "io",
    "hypernet",  # the public names, imported on first use; what others log is silenced before
    "text",
    "base",
    "model",
    "adapters",
    "interop",
    "doc_to_lora",
    "corpora",
    "memory",
    "consolidation",
    "data",
    "training",
    "refining",
    "serving",
    "cli",
)
# Further back than their place in the order says.
NEVER = {
    "model": {"data"},
    "adapters": {"data"},
    "data": {"model", "adapters", "interop", "doc_to_lora", "memory", "consolidation"},
}
MOST_MODULES = 11  # in one folder; more, and a stranger reads a list instead of names
LIGHTNING = {
    "hypernet.data.datamodule",
    "hypernet.training.callbacks",
    "hypernet.training.lit_module",
    "hypernet.training.metrics_file",
    "hypernet.training.run_state",
    "hypernet.training.sharding",
}
HYDRA = {"hypernet.cli.scripts"}  # what the Hydra commands at the top share
NEVER_IN_THE_LIBRARY = {"wandb", "benchmarks", "train", "generate_adapter"}
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


def layer_of(name: str) -> str:
    """The folder below hypernet/ that a module lies in; a module that lies in none is a layer of its own."""
    return (name.split(".") + ["hypernet"])[1] if name != "hypernet" else "hypernet"


def is_for_type_checkers(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache  # four tests ask for each module's
def imports_of(name: str) -> set[str]:
    """Everything a module imports, anywhere in it; our own modules by their full names."""
    found = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    if name == "hypernet":
        # Its public names are imported on first use; type checkers alone see them as imports.
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and is_for_type_checkers(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(filter(None, [base if node.level else "", node.module]))
            for alias in node.names:
                # `from package import module` imports the module, `from module import name` does not.
                full = f"{module}.{alias.name}"
                found.add(full if full in FILES else module)
        elif (
            name != "hypernet"  # whose table of public names says what it imports
            and isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
        ):
            pytest.fail(f"{name} imports by a computed name in line {node.lineno}; write an import statement.")
    return found - {"__future__"}


def ours(name: str) -> set[str]:
    return {found for found in imports_of(name) if found.split(".")[0] in ("hypernet", "kernels")} - {name}


def test_every_folder_is_a_layer():
    assert {layer_of(name) for name in FILES} - {"__main__"} == set(LAYERS)


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for top in ("hypernet", "kernels", "benchmarks") for path in (ROOT / top).rglob("*.py")}),
    ids=lambda folder: str(folder.relative_to(ROOT)),
)
def test_folder_holds_few_modules(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


@pytest.mark.parametrize("name", sorted(FILES))
def test_module_imports_only_earlier_folders(name):
    layer = layer_of(name)
    if layer == "__main__":  # python -m hypernet
        return
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) - NEVER.get(layer, set())
    assert {found for found in ours(name) if layer_of(found) not in allowed} == set()


def test_imports_have_no_cycle():
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
def test_outside_libraries_stay_in_their_folders(name):
    outside = {found.split(".")[0] for found in imports_of(name)}
    assert not outside & NEVER_IN_THE_LIBRARY
    assert name in HYDRA or not outside & {"hydra", "omegaconf"}
    assert name in LIGHTNING or not outside & {"lightning", "pytorch_lightning", "lightning_fabric"}
    if name.startswith("hypernet.kernels"):
        assert outside - {"hypernet"} <= IN_KERNELS
        assert all(found.startswith("hypernet.kernels") for found in ours(name))


def test_modules_allowed_lightning_use_it():
    assert {name for name in FILES if {found.split(".")[0] for found in imports_of(name)} & {"lightning"}} == LIGHTNING


def test_hypernet_alone_imports_little():
    """`import hypernet` takes under 0.3 s: what is slow comes when a public name is used."""
    script = (
        "import sys, hypernet; print(sorted({'torch', 'transformers', 'typer', 'numpy'} & set(sys.modules)))\n"
        "print(hypernet.__version__, set(hypernet.__all__) <= set(dir(hypernet)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"[]\n{hypernet.__version__} True\n"


def test_public_names_are_those_of_their_modules():
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.library import AdapterLibrary
    from hypernet.doc_to_lora import DocToLoRA

    assert hypernet.DocToLoRA is DocToLoRA and hypernet.LoRAAdapter is LoRAAdapter
    assert hypernet.AdapterLibrary is AdapterLibrary


def test_every_public_name_is_seen_by_type_checkers():
    tree = ast.parse(FILES["hypernet"].read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == hypernet._MODULES and sorted(shown) == hypernet.__all__


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hypernet' has no attribute 'DocToLora'"):
        hypernet.DocToLora  # noqa: B018


def test_late_and_relative_imports_are_seen(tmp_path, monkeypatch):
    path = tmp_path / "op.py"
    path.write_text("def f():\n    import wandb.sdk\n    from .plan import Plan\n    from .. import lora_delta\n")
    monkeypatch.setitem(FILES, "hypernet.kernels.lora_delta.op", path)
    found = imports_of.__wrapped__("hypernet.kernels.lora_delta.op")
    assert found == {"wandb.sdk", "hypernet.kernels.lora_delta.plan", "hypernet.kernels.lora_delta"}
