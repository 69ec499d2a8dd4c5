"""Every command and example of README runs as it stands; trainings are cut to one step, outputs go elsewhere."""

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line and line[0] != "#"
]
# Stands in for the checkpoints on the hub, which no test reaches.
PUBLISHED = ROOT.parent / "shared" / "parity" / "reference_tiny"
SHORT = [
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "task.stages=[{steps: 3, batch_size: 2}]",
    "task.validation_stages=[{steps: 1, batch_size: 2}]",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def examples_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands for outputs/ once every Python example has run; what they print is in printed.txt."""
    folder = tmp_path_factory.mktemp("examples")
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        for example in [block for language, block in BLOCKS if language == "python"]:
            exec(compile(example.replace("outputs/", f"{folder}/"), "README.md", "exec"), {})
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder


def test_readme_shows_the_commands() -> None:
    assert "make demo" in README and "make test" in README
    assert len([c for c in COMMANDS if c.startswith(".venv/bin/python")]) >= 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_its_targets(command: str) -> None:
    words = shlex.split(command, comments=True)
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(".venv/bin/python")])
def test_command_runs(command: str, outputs: Path, examples_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = shlex.split(command, comments=True)[1:]
    module = script == "-m"
    script = arguments.pop(0) if module else script
    arguments = [a for a in arguments if not a.startswith(("output_dir=", "trainer.max_steps="))]
    if "hub:" in command:
        if not PUBLISHED.is_dir():
            pytest.skip(f"needs the published-format checkpoint in {PUBLISHED}")
        arguments = [re.sub(r"hub:.*", str(PUBLISHED), argument) for argument in arguments]
        arguments.append(f"base_model={_with_chat_template(PUBLISHED / 'base_model', outputs / 'base_model')}")
    if script == "hypernet.adapters.library":
        arguments = [argument.replace("outputs/", f"{examples_run}/") for argument in arguments]
    elif module:
        arguments += [f"output_dir={outputs / script}"]
    elif script == "train.py":
        # One folder per kind of run, so that ckpt_path=last finds the checkpoint of the run before.
        kind = "base" if "experiment=tiny_base_model" in arguments else "hypernetwork"
        arguments += [*SHORT, f"output_dir={outputs / kind}"]
        if "ckpt_path=last" in arguments:
            arguments.append("trainer.max_steps=2")
            arguments.remove("trainer.max_steps=1")
    else:
        arguments += [f"output_dir={outputs / 'adapter'}", "overwrite=true"]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(ROOT)
    try:
        if module:
            runpy.run_module(script, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    if script == "hypernet.adapters.library":
        pass
    elif module:
        assert list((outputs / script).glob("*.safetensors"))
    elif script == "train.py":
        assert list((outputs / kind / "checkpoints").glob("*.safetensors"))
    else:
        assert (outputs / "adapter" / "adapter_model.safetensors").is_file()


def _with_chat_template(source: Path, target: Path) -> Path:
    from hypernet.base.tokenizer import CHAT_TEMPLATE

    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    target.chmod(0o755)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return target


def test_python_examples_leave_adapters_and_answer(examples_run: Path) -> None:
    for name in ("both", "served"):
        assert (examples_run / name / "adapter_config.json").is_file()
    assert list((examples_run / "library").iterdir())
    assert "Vornia Walmoor" in (examples_run / "printed.txt").read_text(encoding="utf-8")


def test_map_names_every_file_that_is_there() -> None:
    shown = set(re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE))
    assert all((ROOT / name).exists() for name in shown), sorted(name for name in shown if not (ROOT / name).exists())
    modules = {f"hypernet/{path.name}" for path in (ROOT / "hypernet").glob("*.py")} - {"hypernet/__init__.py"}
    mentioned = shown | {f"hypernet/{name}" for name in re.findall(r"`(\w+\.py)`", README)}
    assert modules <= mentioned, f"README's map lacks {sorted(modules - mentioned)}"
