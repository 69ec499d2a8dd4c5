"""Every YAML file below conf/ is found here, composed and built; one that nothing composes fails."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import hypernet.doc_to_lora
import hypernet.training.build
from benchmarks.internalize_cost import GEMMA_2_2B
from hypernet.base.base_model import build_base_model, freeze
from hypernet.training.build import encyclopedia_texts

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
# A tree of its own: tests/benchmarks/test_run.py composes and builds each file of it.
FILES = [path for path in FILES if path.parts[0] != "benchmark"]
TOP = [path.name for path in FILES if len(path.parts) == 1]
EXPERIMENTS = [path.name for path in FILES if path.parts[0] == "experiment"]
# Those for a base model that is not here: built on the meta device, without weights.
LARGE = [name for name in EXPERIMENTS if name.startswith("main_") or name == "niah_gemma2_2b"]
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


WINDOWS = {"smollm2-135m": 8192}  # where the tiny one that stands in for it has less


class Composed(NamedTuple):
    chosen: dict[str, Path]  # see `choices`
    base_model: object


@cache  # each of the files below looks through all of them
def looked_at(*recipe: str) -> Composed:
    cfg = composed(*recipe)
    return Composed(choices(cfg), OmegaConf.select(cfg, "task.base_model"))


def chosen_by(*recipe: str) -> dict[str, Path]:
    return looked_at(*recipe).chosen


def squad_file(folder):
    """Forty paragraphs of two sentences in SQuAD's format."""
    paragraphs = [
        {
            "context": f"The tower of number {n} is {n + 2} metres high. Owls live in it since 19{n + 10}.",
            "qas": [{"id": str(n), "question": "How high?", "answers": [{"text": f"{n + 2}", "answer_start": 0}]}],
        }
        for n in range(40)
    ]
    path = folder / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "Towers", "paragraphs": paragraphs}]}), encoding="utf-8")
    return path


@pytest.fixture
def build(monkeypatch, tmp_path, tiny_base_model_folder):
    """build(recipe): instantiates what train.py would, on the shipped base model or, if there is none, a tiny one."""
    few = lambda seed: encyclopedia_texts(seed=seed, num_articles=60)  # noqa: E731
    monkeypatch.setattr(hypernet.training.build, "encyclopedia_texts", few)
    monkeypatch.chdir(tmp_path)

    def build(*recipe: str):
        cfg = composed(*recipe, f"output_dir={tmp_path}")
        assert resolved(cfg)
        if isinstance(source := cfg.task.base_model, str):
            shipped = ROOT / source
            cfg.task.base_model = str(shipped if (shipped / "config.json").is_file() else tiny_base_model_folder)
            if not (shipped / "config.json").is_file() and "recitation" in str(cfg.task.get("hypernetwork")):
                cfg.task.hypernetwork.rank = 64  # with fewer layers as many places
                cfg.task.hypernetwork.aggregator.num_key_layers = 1
        for source in dict(cfg.task.get("sources") or {}).values():
            source = source.get("of", source)
            if source.get("name") == "squad" and source.path is None:  # of the hub
                source.path = str(squad_file(tmp_path))
        if cfg.task.get("init_from"):
            cfg.task.init_from = None  # what an earlier run has left is not here
        module, data = instantiate(cfg.task, _convert_="all")
        trainer = instantiate(cfg.trainer, _convert_="all")(logger=instantiate(cfg.logger), enable_checkpointing=False)
        return module, data, trainer

    return build


@pytest.mark.parametrize("top", TOP)
def test_every_top_level_config_belongs_to_a_command(top):
    commands = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert [path for path in commands if f'config_name="{top}"' in path.read_text(encoding="utf-8")]
    assert resolved(composed(top))


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in LARGE])
def test_every_experiment_is_complete_and_builds(build, experiment):
    (recipe,) = [recipe for recipe in recipes() if recipe[1:] == (f"experiment={experiment}",)]
    module, data, trainer = build(*recipe)
    # A run takes the stages to their end, and its longest rows fit the base model's window.
    assert trainer.max_steps == len(data.train)
    base_model = module.base_model if hasattr(module, "base_model") else module.model.base_model
    window = WINDOWS.get(looked_at(*recipe).base_model, base_model.config.max_position_embeddings)
    for dataset, step in ((data.train, 0), (data.train, len(data.train) - 1), (data.validation, 0)):
        batch = dataset[step]
        for rows in (batch.student, batch.teacher) if hasattr(batch, "student") else (batch,):
            assert rows.positions.max() < window


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_header_says_how_to_run_it(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    (command,) = re.findall(r"#\s+command\s+python (\S+\.py.*)", text)
    assert (ROOT / command.split()[0]).is_file()
    default = chosen_by("train").get("experiment")
    assert f"experiment={experiment}" in command or default == Path("experiment") / experiment
    for said in ("hardware", "time", "expected"):
        assert re.search(rf"^#\s+{said}\s+\S", text, re.M), said


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_other_config_is_selectable_by_a_command(build, path):
    for recipe in recipes():
        if path in chosen_by(*recipe).values():
            return  # built with the experiment
    if path.parts[0] == "data":
        # One more source of the stages; it is read when a stage draws from it.
        build("train", f"+data@task.sources.more={path.name}")
        return
    for recipe in recipes():
        for key, taken in chosen_by(*recipe).items():
            if taken.parent == path.parent:
                override = f"{key}={path.name}"
                cfg = composed(*recipe, override)
                assert path in choices(cfg).values()
                if "task" in cfg:
                    build(*recipe, override)
                else:  # a benchmark's part, of the package that stands behind the group's name
                    instantiate(OmegaConf.select(cfg, key.partition("@")[2]), _convert_="all")
                return
    pytest.fail(f"No command composes conf/{path}.yaml. Use it in one, or delete it.")


def test_config_that_no_command_composes_fails(monkeypatch, build):
    """The test above does find them."""
    orphan = Path("orphans/lonely")
    monkeypatch.setitem(globals(), "FILES", [*FILES, orphan])
    with pytest.raises(pytest.fail.Exception, match="No command composes conf/orphans/lonely.yaml"):
        test_every_other_config_is_selectable_by_a_command(build, orphan)


# Large ones

# The sizes in config.json of google/gemma-2-2b-it, Qwen/Qwen3-4B-Instruct-2507 and mistralai/Mistral-7B-Instruct-v0.2.
BASE_MODELS = {
    "google/gemma-2-2b-it": GEMMA_2_2B,
    "Qwen/Qwen3-4B-Instruct-2507": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728},
        **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        **{"tie_word_embeddings": True, "max_position_embeddings": 262144},
    },
    "mistralai/Mistral-7B-Instruct-v0.2": {
        **{"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None},
        **{"tie_word_embeddings": False, "max_position_embeddings": 32768},
    },
}
BASE_MODEL_PARAMETERS = {
    "google/gemma-2-2b-it": 2_614_341_888,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
}
# What the paper's 309,456,384 leave out of gemma-2-2b's hypernetwork: latents and output queries, the two norms that
# end the halves of the Perceiver, the pre-head block's two LayerNorms, and the scalers of A and B.
LEFT_OUT = {"latents_q": 2 * 8 * 512, "layernorm": 2 * 512, "LayerNorm": 2 * 2 * 512, "scaler": 2 * 26 * 8}


def expected_parameters(
    *, num_layers: int, hidden: int, wide: int, num_maps: int, num_latents: int = 8, num_blocks: int = 8, rank: int = 8
) -> tuple[int, int]:
    """Of the paper's hypernetwork for down_proj, from its sizes alone: as the paper counts them, and the rest."""
    latent = 512
    attention = 2 * latent * 16 * 128 + 2 * latent * 4 * 128
    block = attention + 3 * latent * 4 * latent + 5 * latent  # five norms
    projection = 3 * hidden * 4 * hidden - 4 * hidden * hidden + 4 * hidden * latent
    pre_head = num_layers * (2 * latent * 4 * latent + 4 * latent + latent)
    head = num_layers * latent * (wide + hidden)
    bias_block = num_layers * rank * (wide + hidden)
    counted = projection + (num_blocks + 1) * block + pre_head + head + bias_block
    outputs = rank * (num_layers if num_maps == 1 else 1)
    rest = (num_latents + outputs) * latent + 2 * latent + 2 * 2 * latent + 2 * num_layers * rank
    return counted, rest


@pytest.fixture
def build_large(monkeypatch, tmp_path, tiny_tokenizer):
    """build_large(experiment): what train.py would build, on the meta device and without init_from's weights."""

    def load(source, **settings):
        base_model = freeze(build_base_model({**BASE_MODELS[source], "pad_token_id": 0}))
        return base_model.to(getattr(torch, settings["dtype"])), tiny_tokenizer

    monkeypatch.setattr(hypernet.training.build, "load_base_model", load)
    monkeypatch.setattr(hypernet.doc_to_lora, "fingerprint", lambda module: "of no weights")

    def build(experiment):
        cfg = composed("train", f"experiment={experiment}", f"output_dir={tmp_path}")
        cfg.task.init_from = None
        with torch.device("meta"):
            module, data = instantiate(cfg.task, _convert_="all")
        data.num_workers = cfg.num_workers
        trainer = instantiate(cfg.trainer, _convert_="all")(logger=False, enable_checkpointing=False)
        return cfg, module, data, trainer

    return build


def test_large_experiments_are_those_without_base_model_here():
    for name in EXPERIMENTS:
        source = looked_at("train", f"experiment={name}").base_model
        assert (source in BASE_MODELS) == (name in LARGE), name


@pytest.mark.parametrize("experiment", LARGE)
def test_large_experiment_has_published_parameter_count(build_large, experiment):
    cfg, module, data, trainer = build_large(experiment)
    assert resolved(cfg)
    model = module.model
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.base_model.parameters()) == BASE_MODEL_PARAMETERS[cfg.task.base_model]
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    config = model.base_model.config
    sizes = {"num_layers": config.num_hidden_layers, "hidden": config.hidden_size, "wide": config.intermediate_size}
    niah = experiment.startswith("niah")
    sizes |= {"num_maps": 1, "num_latents": 208} if niah else {"num_maps": config.num_hidden_layers}
    assert model.hypernetwork.parameter_counts()["total"] == sum(expected_parameters(**sizes))
    assert trainer.max_steps == len(data.train)
    # A chunk with its chat template, and a document with a question, fit the base model's window.
    assert model.max_chunk_tokens < config.max_position_embeddings


def test_papers_hypernetwork_has_its_parameters_and_11680_more(build_large):
    _, module, _, _ = build_large("main_gemma2_2b_stage1")
    sizes = {"num_layers": 26, "hidden": 2304, "wide": 9216, "num_maps": 26}
    assert expected_parameters(**sizes) == (309_456_384, 11_680)
    found = dict.fromkeys(LEFT_OUT, 0)
    network = module.model.hypernetwork
    norms = {f"{name}." for name, part in network.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    for name, parameter in network.named_parameters():
        if name.endswith("latents_q"):
            found["latents_q"] += parameter.numel()
        elif name.endswith(("encoder.layernorm.weight", "decoder.layernorm.weight")):
            found["layernorm"] += parameter.numel()
        elif any(name.startswith(norm) for norm in norms):
            found["LayerNorm"] += parameter.numel()
        elif "scaler_" in name:
            found["scaler"] += parameter.numel()
    assert found == LEFT_OUT and sum(found.values()) == 11_680
    total = network.parameter_counts()["total"]
    assert total == 309_468_064 and total - sum(found.values()) == 309_456_384


def test_main_run_takes_published_number_of_steps(build_large):
    """262,144 document tokens, on 8 devices in parts of 4,096 and 1,024; 1-8 chunks in the second stage alone."""
    for number, (steps, at_once) in enumerate(((80_000, 4096), (20_000, 1024)), start=1):
        cfg, module, data, trainer = build_large(f"main_gemma2_2b_stage{number}")
        (stage,) = data.train.curriculum.stages
        assert stage.steps == trainer.max_steps == steps and stage.max_step_tokens == 2**18
        assert stage.max_step_tokens / trainer.num_devices / trainer.accumulate_grad_batches == at_once
        assert (stage.chunk_weights is None) == (number == 1)
        assert sorted(data.train.curriculum.sources) == ["drop", "pwc", "ropes", "squad", "study"]
        assert set(stage.source) == set(data.train.curriculum.sources)
        assert sum(stage.source.values()) == pytest.approx(1)
        assert {name: term.weight for name, term in module.objective.items()} == {"kl": 1.0, "l1": 0.1}
    weights = stage.chunk_weights
    assert [w / sum(weights) for w in weights[:2]] == [0.5, 0.125] and len(weights) == 8


# Ablations


def differing(one: dict, other: dict, prefix: str = "") -> set[str]:
    """Keys, with dots, whose values differ."""
    found = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differing(a, b, f"{prefix}{key}.")
        elif a != b:
            found.add(prefix + key)
    return found


ABLATIONS = {
    "next_token": {"task.objective.kl.weight", "task.objective.nll.weight"},
    "kl": {"task.objective.nll.weight"},
    "rank": {"task.hypernetwork.rank"},
    "latents": {"task.hypernetwork.aggregator.num_latents"},
    "targets": {"task.target_modules"},
    "early_exit": {"task.context_encoder.kind", "task.context_encoder.layer_idx"},
    "without_locality": {"task.objective.locality_kl.weight"},
    "without_joining": {"task.stages"},
}


def test_every_ablation_is_listed():
    assert {f"tiny_ablation_{name}" for name in ABLATIONS} == {
        name for name in EXPERIMENTS if name.startswith("tiny_ablation_")
    }


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_one_thing(name):
    complete, ablated = (
        resolved(composed("train", f"experiment={experiment}", "output_dir=outputs/same"))
        for experiment in ("tiny_ablation", f"tiny_ablation_{name}")
    )
    assert differing(complete, ablated) - {"name"} == ABLATIONS[name]


def test_ablation_without_joining_joins_no_documents():
    complete, ablated = (
        resolved(composed("train", f"experiment={name}"))["task"]["stages"]
        for name in ("tiny_ablation", "tiny_ablation_without_joining")
    )
    assert complete[-1].pop("num_joined_documents") == [1, 2] and ablated[-1].pop("num_joined_documents") == [1, 1]
    assert complete == ablated and not any("num_joined_documents" in stage for stage in complete)


def test_ablation_sweep_runs_have_folders_with_their_names():
    cfg = composed("train", "experiment=tiny_ablation_rank", "task.hypernetwork.rank=4", "seed=2")
    assert (cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir) == ("outputs/tiny_ablations", "tiny_ablation_rank_4_seed_2")


@pytest.mark.story(13)
def test_ablation_sweep_runs_as_its_header_says(commands, tmp_path, tiny_base_model_folder):
    header = (CONF / "experiment/tiny_ablation.yaml").read_text(encoding="utf-8")
    (sweep,) = re.findall(r"#\s+sweep\s+python (train\.py .*?)  ", header)
    _, *arguments = shlex.split(sweep.replace("glob(tiny_ablation*)", "glob(tiny_ablation_w*)").replace("0,1,2", "3"))
    stage = "[{steps: 1, batch_size: 2, facts_per_entity: [1, 2]}]"
    small = [f"task.{stages}={stage}" for stages in ("stages", "validation_stages")]
    small += ["trainer.max_steps=1", "trainer.accelerator=cpu", "trainer.precision=32-true", "threads=1"]
    small += [f"task.base_model={tiny_base_model_folder}", "task.hypernetwork.aggregator.latent_dim=16"]
    result = commands.run("train.py", [*arguments, *small], cwd=tmp_path)
    assert result.code == 0, result.stderr
    folders = sorted(path.parent.name for path in (tmp_path / "outputs/tiny_ablations").glob("*/checkpoint"))
    assert folders == ["tiny_ablation_without_joining_seed_3", "tiny_ablation_without_locality_seed_3"]
