"""What a user sees: the whole screen of every command, compared with what is for the user.

Libraries say something when they are imported, and when they are used. So one command of each kind runs as a user
starts it, in a process of its own; the others in forks of one that has imported only what says nothing by itself, as
those tell: torch and lightning, which take two thirds of the time.
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypernet.io.logs import log_kept_back, without_weight_bars
from tests.forked_commands import Commands

ROOT = Path(__file__).parents[2]
FILES = [path for top in ("", "benchmarks", "hypernet") for path in (ROOT / top).glob("**/*.py" if top else "*.py")]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in FILES
    if path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
NO_CHECKPOINT = (
    "No checkpoint at {tmp}/none: there is no such folder. Give a folder that holds config.yaml, or a published "
    "pytorch_model.bin."
)
ONE_STEP = "trainer.max_steps=1 trainer.enable_progress_bar=false task.stages=[{steps:1,batch_size:2}]"
# Command → the whole screen as a regular expression, standard output first, {tmp} for the test's folder. Of each kind
# of command that imports transformers, as far as the libraries have something to say.
AS_A_USER = {
    "generate_adapter.py checkpoint=assets/tiny document={tmp}/note.txt output_dir={tmp}/a ask=Who? max_new_tokens=1 "
    "compare=false": (
        r"[┏┃┡│└][^%]*\nRead .*\nAdapter .*\nSeconds .*\nPEFT .*\n",
        r"Loading assets/tiny on cpu\nInternalizing note.txt\nAnswering\n",
    ),
    f"train.py {ONE_STEP} output_dir={{tmp}}/train": (
        r"Hypernetwork: .* parameters\nCheckpoint written to {tmp}/train/checkpoint\n",
        "",
    ),
    "-c from#hypernet#import#DocToLoRA;print(DocToLoRA.from_pretrained('assets/tiny').max_chunk_tokens)": ("20\n", ""),
}
FORKED = {
    "generate_adapter.py checkpoint=assets/tiny document={tmp}/note.txt output_dir={tmp}/a base_model=nobody/nothing": (
        "",
        r"Loading assets/tiny on cpu\ngenerate_adapter.py: Could not load the base model from nobody/nothing: .*\n",
    ),
    f"train.py experiment=tiny_base_model {ONE_STEP} output_dir={{tmp}}/base": (
        r"[^%]*written to {tmp}/base/base_model\n",
        "",
    ),
    "hypernet self-study --documents {tmp}/note.txt --base-model assets/tiny/base_model --output-dir {tmp}/study": (
        r"1 shards made in {tmp}/study; .*\n",
        r"{tmp}/study/shard-00000.parquet: .*\n",
    ),
    "hypernet checkpoint convert --source {tmp}/none --output-dir {tmp}/own": (
        "",
        r"hypernet: There is no published checkpoint {tmp}/none\. .*\n",
    ),
    "hypernet library add --adapter {tmp}/none": ("", "hypernet: [^\n]*{tmp}/none[^\n]*\n"),
    "benchmarks.tiny_figures checkpoint={tmp}/none": ("", rf"benchmarks.tiny_figures: {NO_CHECKPOINT}\n"),
    "benchmarks.training_speed model=none": ("", r"benchmarks.training_speed: model should be .*\n"),
}
# A hub that is asked, and not there.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
ENVIRONMENT |= {"HF_ENDPOINT": "http://127.0.0.1:9"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def name_of(command: str) -> str:
    return " ".join(command.split()[:3])[:40]


@pytest.fixture(scope="module")
def forked():
    """Forks of a process that has imported what each command does to read its arguments, torch and lightning."""
    with Commands(("hydra", "pydantic", "typer", "rich.console", "lightning.pytorch"), ENVIRONMENT) as commands:
        yield commands


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_all_that_help_prints(command, forked):
    module = command.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    done = forked.run(command if "/" not in command else module, ["--help"], cwd=ROOT)
    assert (done.code, done.stderr) == (0, "") and len(done.stdout) > 100


@pytest.fixture
def note(tmp_path):
    (tmp_path / "note.txt").write_text("Olwin Corton was born in Norbach.")


def assert_shows(stdout: str, stderr: str, expected: tuple[str, str], folder: Path) -> None:
    for printed, pattern in zip((stdout, stderr), expected, strict=True):
        assert re.fullmatch(pattern.replace("{tmp}", re.escape(str(folder))), printed), (stdout, stderr)


@pytest.mark.parametrize("command", AS_A_USER, ids=name_of)
def test_screen_shows_nothing_but_what_is_for_the_user(note, tmp_path, command):
    done = run(*(part.replace("{tmp}", str(tmp_path)).replace("#", " ") for part in command.split()))
    assert_shows(done.stdout, done.stderr, AS_A_USER[command], tmp_path)


@pytest.mark.parametrize("command", FORKED, ids=name_of)
def test_screen_of_other_commands_is_for_the_user(note, tmp_path, command, forked):
    name, *arguments = command.replace("{tmp}", str(tmp_path)).split()
    done = forked.run(name, arguments, cwd=ROOT)
    assert_shows(done.stdout, done.stderr, FORKED[command], tmp_path)


def test_logging_of_a_program_stays_its_own():
    script = (
        "import logging, warnings\n"
        "before = logging.root.handlers[:], logging.root.level, warnings.filters[:]\n"
        "import hypernet\n"
        "assert before == (logging.root.handlers, logging.root.level, warnings.filters)\n"
        "for name in ('torchao', 'torch.utils._pytree', 'transformers', 'mine'):\n"
        "    logging.getLogger(name).warning('of %s', name)\n"
    )
    done = run("-c", script)
    assert done.stderr.splitlines() == ["of torchao", "of torch.utils._pytree", "of transformers", "of mine"]


def test_weight_bars_come_back_with_the_hook_before():
    from transformers.utils import logging as of_transformers

    hook = lambda bar, args, kwargs: bar(*args, **kwargs)  # noqa: E731
    outer = of_transformers.set_tqdm_hook(hook)
    try:
        with pytest.raises(KeyError), without_weight_bars():
            assert of_transformers.tqdm(total=3).disable
            raise KeyError
        assert of_transformers.set_tqdm_hook(hook) is hook
    finally:
        of_transformers.set_tqdm_hook(outer)


def test_log_kept_back_is_listed_and_shown_again_after(caplog):
    logger = logging.getLogger("some_library.part")
    with log_kept_back("some_library") as messages:
        logger.warning("line %d", 1)
        logger.info("no matter")
    logger.warning("line %d", 2)
    assert messages == ["line 1"] and caplog.messages == ["line 2"]
