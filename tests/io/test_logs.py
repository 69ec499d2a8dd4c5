"""What a user sees: every command in a process of its own, its whole screen compared with what is for the user."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypernet.io.logs import log_kept_back, without_weight_bars

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
# Arguments → the whole screen as a regular expression, standard output first, {tmp} for the test's folder. Of each kind
# of command that imports transformers, as far as the libraries have something to say.
SCREENS = {
    "generate_adapter.py document={tmp}/note.txt output_dir={tmp}/adapter ask=Who? max_new_tokens=1 compare=false": (
        r"[┏┃┡│└][^%]*\nRead .*\nAdapter .*\nSeconds .*\nPEFT .*\n",
        r"Loading assets/tiny on cpu\nInternalizing note.txt\nAnswering\n",
    ),
    "generate_adapter.py document={tmp}/note.txt output_dir={tmp}/adapter base_model=nobody/nothing": (
        "",
        r"Loading assets/tiny on cpu\ngenerate_adapter.py: Could not load the base model from nobody/nothing: .*\n",
    ),
    f"train.py {ONE_STEP} output_dir={{tmp}}/train": (
        r"Hypernetwork: .* parameters\nCheckpoint written to {tmp}/train/checkpoint\n",
        "",
    ),
    f"train.py experiment=tiny_base_model {ONE_STEP} output_dir={{tmp}}/base": (
        r"[^%]*written to {tmp}/base/base_model\n",
        "",
    ),
    "-m hypernet self-study --documents {tmp}/note.txt --base-model assets/tiny/base_model --output-dir {tmp}/study": (
        r"1 shards made in {tmp}/study; .*\n",
        r"{tmp}/study/shard-00000.parquet: .*\n",
    ),
    "-m hypernet checkpoint convert --source {tmp}/none --output-dir {tmp}/own": (
        "",
        r"hypernet: There is no published checkpoint {tmp}/none\. .*\n",
    ),
    "-m hypernet library add --adapter {tmp}/none": ("", "hypernet: [^\n]*{tmp}/none[^\n]*\n"),
    "-m benchmarks.tiny_figures checkpoint={tmp}/none": ("", rf"benchmarks.tiny_figures: {NO_CHECKPOINT}\n"),
    "-m benchmarks.training_speed model=none": ("", r"benchmarks.training_speed: model should be .*\n"),
    "-c from#hypernet#import#DocToLoRA;print(DocToLoRA.from_pretrained('assets/tiny').max_chunk_tokens)": ("20\n", ""),
}


def run(*arguments: str) -> subprocess.CompletedProcess:
    # A hub that is asked, and not there.
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_all_that_help_prints(command):
    module = command.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    done = run(*([command] if "/" not in command else ["-m", module]), "--help")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout) > 100


@pytest.mark.parametrize("command", SCREENS, ids=lambda command: " ".join(command.split()[:3])[:40])
def test_screen_shows_nothing_but_what_is_for_the_user(tmp_path, command):
    (tmp_path / "note.txt").write_text("Olwin Corton was born in Norbach.")
    done = run(*(part.replace("{tmp}", str(tmp_path)).replace("#", " ") for part in command.split()))
    for printed, expected in zip((done.stdout, done.stderr), SCREENS[command], strict=True):
        assert re.fullmatch(expected.replace("{tmp}", re.escape(str(tmp_path))), printed), done


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
