"""Every YAML file below conf/ is found here, composed and built; one that nothing composes fails."""

import re
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import hypernet.training
from hypernet.training import encyclopedia_texts

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
# A tree of its own: tests/benchmarks/test_run.py composes and builds each file of it.
FILES = [path for path in FILES if path.parts[0] != "benchmark"]
TOP = [path.name for path in FILES if len(path.parts) == 1]
EXPERIMENTS = [path.name for path in FILES if path.parts[0] == "experiment"]
# Hydra's own groups are for its plugins (tests/test_train.py).
OPTIONS = [path for path in FILES if len(path.parts) > 1 and path.parts[0] not in ("experiment", "hydra")]


def composed(top: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(top, overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)  # for ${hydra:...}
    return cfg


def choices(cfg: DictConfig) -> dict[str, Path]:
    """Override key, such as hypernetwork@task.hypernetwork → the file it takes."""
    chosen = {key: Path(key.split("@")[0]) / str(option) for key, option in cfg.hydra.runtime.choices.items()}
    return {key: path for key, path in chosen.items() if path in FILES}


def resolved(cfg: DictConfig) -> dict:
    """All settings but Hydra's own; fails if one is missing or refers to nothing."""
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(own, resolve=True, throw_on_missing=True)


@cache
def recipes() -> list[tuple[str, ...]]:
    """(top-level file, overrides...) of all commands and experiments."""
    with_experiments = [top for top in TOP if "experiment" in composed(top).hydra.runtime.choices]
    assert with_experiments or not EXPERIMENTS
    return [*((top,) for top in TOP), *((top, f"experiment={e}") for top in with_experiments for e in EXPERIMENTS)]


@pytest.fixture
def build(monkeypatch, tmp_path, tiny_base_model_folder):
    """build(recipe): instantiates what train.py would, on the shipped base model or, if there is none, a tiny one."""
    few = lambda seed: encyclopedia_texts(seed=seed, num_articles=60)  # noqa: E731
    monkeypatch.setattr(hypernet.training, "encyclopedia_texts", few)
    monkeypatch.chdir(tmp_path)

    def build(*recipe: str):
        cfg = composed(*recipe, f"output_dir={tmp_path}")
        if isinstance(source := cfg.task.base_model, str):
            shipped = ROOT / source
            cfg.task.base_model = str(shipped if (shipped / "config.json").is_file() else tiny_base_model_folder)
        if cfg.task.get("init_from"):
            cfg.task.init_from = None  # what an earlier run has left is not here
        module, data = instantiate(cfg.task, _convert_="all")
        trainer = instantiate(cfg.trainer, _convert_="all")(logger=instantiate(cfg.logger), enable_checkpointing=False)
        return module, data, trainer

    return build


@pytest.mark.parametrize("top", TOP)
def test_every_top_level_file_is_a_command_s_and_resolves(top):
    commands = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert [path for path in commands if f'config_name="{top}"' in path.read_text(encoding="utf-8")]
    assert resolved(composed(top))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_complete_and_can_be_built(build, experiment):
    (recipe,) = [recipe for recipe in recipes() if recipe[1:] == (f"experiment={experiment}",)]
    assert resolved(composed(*recipe))
    module, data, trainer = build(*recipe)
    # A run takes the stages to their end, and its longest rows fit the base model's window.
    assert trainer.max_steps == len(data.train)
    base_model = module.base_model if hasattr(module, "base_model") else module.model.base_model
    for dataset, step in ((data.train, 0), (data.train, len(data.train) - 1), (data.validation, 0)):
        batch = dataset[step]
        for rows in (batch.student, batch.teacher) if hasattr(batch, "student") else (batch,):
            assert rows.positions.max() < base_model.config.max_position_embeddings


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_s_header_says_how_to_run_it(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    (command,) = re.findall(r"#\s+command\s+python (\S+\.py.*)", text)
    assert (ROOT / command.split()[0]).is_file()
    default = choices(composed("train")).get("experiment")
    assert f"experiment={experiment}" in command or default == Path("experiment") / experiment
    assert re.search(r"#\s+hardware\s+\S", text)


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_other_file_is_chosen_by_some_command_or_can_be(build, path):
    for recipe in recipes():
        if path in choices(composed(*recipe)).values():
            return  # built with the experiment
    if path.parts[0] == "data":
        # One more source of the stages; it is read when a stage draws from it.
        build("train", f"+data@task.sources.more={path.name}")
        return
    for recipe in recipes():
        for key, taken in choices(composed(*recipe)).items():
            if taken.parent == path.parent:
                override = f"{key}={path.name}"
                assert path in choices(composed(*recipe, override)).values()
                build(*recipe, override)
                return
    pytest.fail(f"No command composes conf/{path}.yaml. Use it in one, or delete it.")


def test_a_file_that_no_command_composes_fails(monkeypatch, build):
    """The test above does find them."""
    orphan = Path("orphans/lonely")
    monkeypatch.setitem(globals(), "FILES", [*FILES, orphan])
    with pytest.raises(pytest.fail.Exception, match="No command composes conf/orphans/lonely.yaml"):
        test_every_other_file_is_chosen_by_some_command_or_can_be(build, orphan)
