"""The setup: Makefile, .ci/run, constraints.txt and the packaging, without network.

The Makefile itself runs, copied to a folder with a space in its name, on a PATH that holds only the tools it needs and
stand-ins for Python: shell scripts that answer the Makefile's questions and log their calls.
"""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOOLS = ("awk", "bash", "cat", "chmod", "cp", "dirname", "echo", "find", "make", "mkdir", "rm", "sh", "touch")
# Optional: too large for an extra, or in need of an older protobuf than the pinned one; who needs one names it.
NOT_OURS_TO_INSTALL = {"vllm", "sentence-transformers", "mem0"}
DISTRIBUTION_OF = {"yaml": "pyyaml", "hydra": "hydra-core", "omegaconf": "hydra-core", "bs4": "beautifulsoup4"}

# `-m venv` copies the stand-in to .venv/bin/python, so that what runs in .venv is logged as well.
FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in
  --version) echo "Python {version}" ;;
  *version_info*) exit {too_old} ;;
  *ensurepip*) exit {no_venv} ;;
  *"import pip"*) echo ok ;;
  "-m venv"*) rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m $FAILS"*) echo "ERROR: no index" >&2; exit 1 ;;
  "-m pip install"*) echo "an install warning" >&2; echo "an install line" ;;
esac
"""


@dataclass
class Checkout:
    """A copy of the set-up files, with a PATH of its own."""

    folder: Path
    bin: Path
    calls_file: Path

    def add_python(self, name: str, *, version: str = "3.12.1", too_old: bool = False, no_venv: bool = False) -> Path:
        path = self.bin / name
        path.write_text(FAKE_PYTHON.format(version=version, too_old=int(too_old), no_venv=int(no_venv)))
        path.chmod(0o755)
        return path

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "CI": "true", "FAILS": "nothing", **env}
        self.calls_file.write_text("")
        return subprocess.run(
            command, cwd=self.folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def calls(self, what: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if what in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("GNU make is what is tested")
    folder, bin = tmp_path / "a clone with spaces", tmp_path / "bin"
    (folder / ".ci").mkdir(parents=True)
    bin.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        shutil.copy(ROOT / name, folder / name)
    for tool in TOOLS:
        if found := shutil.which(tool):
            (bin / tool).symlink_to(found)
    return Checkout(folder, bin, tmp_path / "calls.txt")


def test_setup_installs_pins_from_a_path_with_a_space(checkout: Checkout):
    checkout.add_python("python3")
    result = checkout.run("make", "test")
    assert result.returncode == 0, result.stderr
    assert len(checkout.calls("-m venv --clear .venv")) == 1
    assert result.stderr == "" and "an install" not in result.stdout
    upgrade, pip = checkout.calls("-m pip install")
    assert upgrade.endswith("--upgrade pip")
    assert pip.startswith(".venv/bin/python ") and "-c constraints.txt" in pip
    assert "-e .[test,documents,bench,sweep,serve,mcp,postgres,ray,private]" in pip and "--no-compile" in pip
    (tests,) = checkout.calls("-m pytest")
    assert tests.startswith(".venv/bin/python ")


def test_second_make_installs_nothing(checkout: Checkout):
    checkout.add_python("python3")
    checkout.run("make", "test")
    result = checkout.run("make", "test")
    assert result.returncode == 0
    assert checkout.calls("-m pytest") and not checkout.calls("-m venv") and not checkout.calls("-m pip")


def test_changed_pins_are_installed_into_same_environment(checkout: Checkout):
    checkout.add_python("python3")
    checkout.run("make", "test")
    later = (checkout.folder / ".venv/.installed").stat().st_mtime + 10
    os.utime(checkout.folder / "constraints.txt", (later, later))
    result = checkout.run("make", "test")
    assert result.returncode == 0
    assert checkout.calls("-m pip install") and not checkout.calls("-m venv")


def test_failed_install_fails_make_and_is_retried(checkout: Checkout):
    checkout.add_python("python3")
    result = checkout.run("make", "demo", FAILS="pip")
    assert result.returncode != 0
    assert re.fullmatch(r"ERROR: no index\nmake: pip could not install .* package index .*\nmake: .*\n", result.stderr)
    assert not checkout.calls("generate_adapter.py") and not (checkout.folder / ".venv/.installed").exists()

    result = checkout.run("make", "demo")
    assert result.returncode == 0
    for step in ("-m venv --clear", "-m pip install", "generate_adapter.py document="):
        assert checkout.calls(step)


def test_failed_update_is_not_marked_as_installed(checkout: Checkout):
    checkout.add_python("python3")
    checkout.run("make", "test")
    later = (checkout.folder / ".venv/.installed").stat().st_mtime + 10
    os.utime(checkout.folder / "pyproject.toml", (later, later))
    assert checkout.run("make", "test", FAILS="pip").returncode != 0
    assert checkout.run("make", "test").returncode == 0
    assert checkout.calls("-m venv --clear") and checkout.calls("-m pip install")


def test_incomplete_environment_is_recreated(checkout: Checkout):
    checkout.add_python("python3")
    (checkout.folder / ".venv/bin").mkdir(parents=True)
    result = checkout.run("make", "test")
    assert result.returncode == 0, result.stderr
    assert checkout.calls("-m venv --clear") and checkout.calls("-m pytest")


def test_environment_without_its_interpreter_is_recreated(checkout: Checkout):
    checkout.add_python("python3")
    checkout.run("make", "test")
    python = checkout.folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    result = checkout.run("make", "test")
    assert result.returncode == 0, result.stderr
    assert checkout.calls("-m venv --clear") and checkout.calls("-m pip install") and checkout.calls("-m pytest")


@pytest.mark.parametrize("command", [("make", "test"), ("make", "demo"), ("bash", ".ci/run")])
def test_too_old_python_is_a_one_line_error(checkout: Checkout, command: tuple[str, ...]):
    checkout.add_python("python3", version="3.9.18", too_old=True)
    checkout.add_python("python", version="2.7.18", too_old=True)
    result = checkout.run(*command)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if "Python" in line]
    old = ("python3 is Python 3.9.18, too old", "python is Python 2.7.18, too old")
    for hint in ("Python 3.11 or newer", *old, "make PYTHON=", "python.org"):
        assert hint in line
    assert not (checkout.folder / ".venv").exists()


def test_missing_python_is_an_error_with_a_hint(checkout: Checkout):
    result = checkout.run("make", "test")
    assert result.returncode != 0
    assert "None found" in result.stderr and "make PYTHON=" in result.stderr


def test_python_without_venv_names_the_package_to_install(checkout: Checkout):
    checkout.add_python("python3.11", no_venv=True)
    result = checkout.run("make", "test")
    assert result.returncode != 0
    assert "python3.11 has no venv module" in result.stderr and "apt-get install python3-venv" in result.stderr


def test_first_usable_python_is_taken(checkout: Checkout):
    shim = checkout.bin / "python3.11"  # what pyenv leaves for a version that is not selected
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    checkout.add_python("python3.12", no_venv=True)
    checkout.add_python("python3", version="3.10.2", too_old=True)
    checkout.add_python("python")
    result = checkout.run("make", "test")
    assert result.returncode == 0, result.stderr
    (venv,) = checkout.calls("-m venv")
    assert venv.startswith(f"{checkout.bin}/python -m")


@pytest.mark.parametrize("command", [("make", "test"), ("make", "test", "PYTHON=my python")])
def test_named_python_is_the_only_one_tried(checkout: Checkout, command: tuple[str, ...]):
    checkout.add_python("python3.11")
    mine = checkout.add_python("my python")
    result = checkout.run(*command, PYTHON=str(mine))
    assert result.returncode == 0, result.stderr
    (venv,) = checkout.calls("-m venv")
    assert venv.startswith(str(mine))
    assert not checkout.calls("python3.11")


def test_named_python_that_is_missing_is_not_replaced_by_another(checkout: Checkout):
    checkout.add_python("python3.11")
    result = checkout.run("make", "test", "PYTHON=/nonexistent/python")
    assert result.returncode != 0
    assert "None found: /nonexistent/python" in result.stderr


@pytest.mark.parametrize("command", [("make", "test"), ("bash", ".ci/run")])
def test_failing_tests_fail_make(checkout: Checkout, command: tuple[str, ...]):
    checkout.add_python("python3")
    assert checkout.run(*command, FAILS="pytest").returncode != 0
    assert checkout.run(*command).returncode == 0


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
@pytest.mark.parametrize("command", [("make", "check"), ("bash", ".ci/run")])
def test_failing_check_fails_make_and_ci_before_the_tests(checkout: Checkout, command: tuple[str, ...], tool: str):
    checkout.add_python("python3")
    assert checkout.run(*command, FAILS=tool).returncode != 0
    assert checkout.calls(f"-m {tool}") and not checkout.calls("-m pytest")
    assert checkout.run(*command).returncode == 0


def test_ci_run_calls_make_check_and_test_in_the_root(checkout: Checkout):
    make = checkout.bin / "make"
    make.unlink()
    make.write_text('#!/bin/sh\necho "make $* in $PWD"\nexit 7\n')
    make.chmod(0o755)
    result = checkout.run("bash", str(checkout.folder / ".ci/run"))
    assert (result.returncode, result.stdout) == (7, f"make check test in {checkout.folder}\n")


def test_ci_run_without_make_says_how_to_get_it(checkout: Checkout):
    (checkout.bin / "make").unlink()
    result = checkout.run("bash", ".ci/run")
    assert result.returncode != 0
    assert "apt-get install make" in result.stderr


def test_ci_run_is_executable():
    assert os.stat(ROOT / ".ci/run").st_mode & stat.S_IXUSR


def test_plain_make_lists_every_target(checkout: Checkout):
    result = checkout.run("make")
    assert result.returncode == 0
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert [line.split()[1] for line in result.stdout.splitlines()] == targets
    assert not (checkout.folder / ".venv").exists()


def test_clean_keeps_the_outputs(checkout: Checkout):
    checkout.add_python("python3")
    checkout.run("make", "test")
    for folder in ("outputs/demo", "hypernet/__pycache__", ".mypy_cache"):
        (checkout.folder / folder).mkdir(parents=True)
    result = checkout.run("make", "clean")
    assert result.returncode == 0, result.stderr
    assert not any((checkout.folder / removed).exists() for removed in (".venv", ".mypy_cache", "hypernet/__pycache__"))
    assert (checkout.folder / "outputs/demo").exists()


def test_make_needles_trains_missing_models_then_measures(checkout: Checkout):
    checkout.add_python("python3")
    trainings = ["tiny_base_model_needles", "niah_tiny", "niah_tiny_distractors"]
    for there in range(len(trainings) + 1):
        result = checkout.run("make", "needles", "TRAIN_ARGS=seed=1")
        assert result.returncode == 0, result.stderr
        begun = [f".venv/bin/python train.py experiment={name} ckpt_path=auto seed=1" for name in trainings[there:]]
        assert checkout.calls("train.py") == begun
        sweep, report = checkout.calls("")[-2:]
        assert sweep.endswith("-m benchmarks.run sweep=niah hydra/launcher=joblib hydra.launcher.n_jobs=2")
        assert "-m benchmarks.report input_dir=outputs/benchmark_niah " in report
        if there < len(trainings):
            left = "base_model" if "base_model" in trainings[there] else "checkpoint"
            (checkout.folder / "outputs" / trainings[there] / left).mkdir(parents=True)


def test_makefile_and_pyproject_require_the_same_python():
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert "sys.version_info < (3, 11)" in (ROOT / "Makefile").read_text()


def declared() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    return [Requirement(text) for text in project["dependencies"] + extras]


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"==[^*+,]+", str(pin.specifier)), f"{pin} is not one public version"
    version_of = {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pins}
    for requirement in declared():
        version = version_of.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"constraints.txt pins {version}, pyproject says {requirement}"


def test_dependency_ranges_include_oldest_supported_versions():
    oldest = {"torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0"}
    specifier_of = {requirement.name: requirement.specifier for requirement in declared()}
    for name, version in oldest.items():
        assert specifier_of[name].contains(version)


def test_every_import_is_a_declared_dependency():
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    ours = {"hypernet", "benchmarks"}
    files = [file for folder in ("hypernet", "kernels", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    for file in [*files, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - ours - sys.stdlib_module_names:
                distribution = canonicalize_name(DISTRIBUTION_OF.get(top, top))
                known = distribution in names | NOT_OURS_TO_INSTALL
                assert known, f"{file} imports {top}: declare it in pyproject.toml"


def test_kernels_is_not_a_top_level_package():
    link = ROOT / "hypernet/kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()
    assert PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["hypernet*"]


def test_package_data_files_are_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [file for folder in ("hypernet", "kernels") for file in (ROOT / folder).rglob("*") if file.is_file()]
    for file in files:
        if file.suffix not in (".py", ".pyc"):
            assert any(file.match(pattern) for pattern in patterns), f"{file}: add it to package-data in pyproject.toml"
