"""Train a hypernetwork, or the tiny base model that it adapts. `python train.py --help` says what can be set.

A run that ends before its first step leaves nothing behind; a finished one is replaced only if it is told to.
"""

import fcntl
import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from hypernet.cli.scripts import Script, check_targets, plain
from hypernet.cli.settings import (
    Above0,
    AtLeast0,
    Count,
    Name,
    Number,
    Open,
    OutputFolder,
    Settings,
    Share,
    Text,
    arguments_of,
    checked,
    no_such_setting,
)


class OptimizerSettings(Settings):
    lr: Above0
    muon_scale: Above0 | None
    weight_decay: AtLeast0
    betas: Annotated[list[Share], Field(min_length=2, max_length=2, description="two numbers from 0 to 1")]
    warmup_steps: Number
    decay_ratio: Share
    min_lr_ratio: Share


class TrainerSettings(Open):
    """Of what Lightning's trainer takes, and checks itself, that which conf/trainer/ has."""

    max_steps: Count
    accumulate_grad_batches: Count
    gradient_clip_val: AtLeast0 | None
    log_every_n_steps: Count
    val_check_interval: Above0
    devices: int | list[int] | Text
    num_nodes: Count
    enable_progress_bar: bool


class TrainSettings(Settings):
    """What can be set, as conf/train.yaml has it."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32, description="a whole number, at least 0 and below 2^32")]
    output_dir: OutputFolder
    overwrite: bool
    ckpt_path: Text | None
    threads: Count | None
    checkpoint_every: Count
    keep_checkpoints: Count
    on_nan: Literal["stop", "skip"]
    num_workers: Number
    worker_timeout_s: AtLeast0
    callbacks: dict[str, dict[str, Any] | None]
    optimizer: OptimizerSettings
    trainer: TrainerSettings
    logger: dict[str, Any] | None
    task: dict[str, Any]


class TrainScript(Script[TrainSettings]):
    """The command, which knows what settings of version 0.1 are called now."""

    def explain(self, error: BaseException) -> str | None:
        return _called_now(str(error)) or super().explain(error)


CONFIG = Path(".hydra/config.yaml")  # in a run's folder
SCRIPT = TrainScript("train.py", TrainSettings)


def train(cfg: DictConfig) -> None:
    """Builds what `cfg.task` describes and fits it, from `cfg.ckpt_path` if that is given."""
    _check(cfg)
    from hypernet.training.host_memory import keep_flat

    keep_flat()
    import lightning
    import torch
    from lightning.pytorch.utilities import disable_possible_user_warnings

    # Of what Lightning says by itself only warnings matter here, and not those that it calls possible: that the frozen
    # base model is in eval mode, that every process validates on all of it, that a run ends before its first log line.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_possible_user_warnings()
    warnings.filterwarnings("ignore", message=".*treespec")
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of tensors of a few numbers

    from hypernet.training.callbacks import StepProgressBar
    from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.output_dir = HydraConfig.get().runtime.output_dir  # each run of a sweep has a folder of its own
    check_targets({key: plain(cfg)[key] for key in ("trainer", "callbacks", "logger", "task")})
    _check_parts(plain(cfg)["task"])
    checkpoints = Path(cfg.output_dir) / "checkpoints"
    ckpt_path = find_checkpoint(cfg.ckpt_path, checkpoints)
    goes_on = ckpt_path is not None and ckpt_path.resolve().parent == checkpoints.resolve()
    if not goes_on:
        _check_free(cfg)
    lightning.seed_everything(cfg.seed, verbose=False)
    with _run_folder(cfg, goes_on=goes_on) as trainers:
        saving = RunCheckpoint(
            checkpoints,
            every_n_train_steps=cfg.checkpoint_every,
            keep=cfg.keep_checkpoints,
            replaces=not goes_on,
            config=plain(cfg),
        )
        watching = [callback for callback in instantiate(cfg.callbacks, _convert_="all").values() if callback]
        if cfg.trainer.enable_progress_bar:
            watching.append(StepProgressBar())
        trainer = _built(cfg.trainer)(
            logger=instantiate(cfg.logger), callbacks=[*watching, saving], plugins=[SafetensorsCheckpointIO()]
        )
        trainers.append(trainer)
        module, data = instantiate(cfg.task, _convert_="all")
        data.num_workers, data.worker_timeout_s = cfg.num_workers, cfg.worker_timeout_s
        trainer.fit(module, data, ckpt_path=ckpt_path)


def _check(cfg: DictConfig) -> None:
    """What needs no torch.

    Raises:
        ValueError: a setting cannot be, or what the run starts from is not there.
    """
    if "experiment" in cfg:
        raise ValueError(
            "The experiment's file should begin with the line '# @package _global_'. If it does, a byte order mark "
            "hides it: save the file as UTF-8 without one."
        )
    known = TrainSettings.model_fields
    if own := [str(key) for key in cfg if key not in known]:
        # An experiment may have keys of its own, which others refer to: there, unless the command line replaces those.
        files = [path for source in HydraConfig.get().runtime.config_sources for path in _experiments(source.path)]
        texts = [OmegaConf.to_yaml(part, resolve=False) for part in (cfg, HydraConfig.get())]
        everything = "\n".join([*texts, *(path.read_text(encoding="utf-8", errors="replace") for path in files)])
        for key in own:
            if not re.search(rf"\$\{{{re.escape(key)}\b", everything):
                raise ValueError(no_such_setting(key, list(known)))
    checked(TrainSettings, {key: value for key, value in plain(cfg).items() if key in known})
    _check_earlier_runs(cfg.task)


def _experiments(folder: str) -> list[Path]:
    return sorted(Path(folder, "experiment").glob("*.yaml"))


def _check_parts(task: Mapping[str, Any]) -> None:
    """The settings that the task hands on to others: the hypernetwork's and the stages'."""
    from hypernet.data.curriculum import Stage
    from hypernet.model.hypernetwork import HyperNetwork

    if "hypernetwork" in task:
        checked(arguments_of(HyperNetwork), task["hypernetwork"], place="task.hypernetwork")

    def check_stages(stages: Any, place: str) -> None:
        for number, stage in enumerate(stages if isinstance(stages, list) else []):
            if isinstance(stage, dict):
                check_stages(stage.get("alternate"), f"{place}.{number}.alternate")
                own = {name: value for name, value in stage.items() if name != "alternate"}
                checked(arguments_of(Stage), own, place=f"{place}.{number}")

    for name in ("stages", "validation_stages"):
        check_stages(task[name], f"task.{name}")


def _check_free(cfg: DictConfig) -> None:
    """Refuses to mix a new run into other files, and to replace what an earlier run has left, unless it is told to.

    Raises:
        ValueError: the output folder holds what no run of this command leaves; or a checkpoint or a trained model.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from hypernet.training.run_state import SUFFIX

    folder = Path(cfg.output_dir)
    trained = [Path(cfg.task.output_dir)] if cfg.task.get("output_dir") else []
    checkpoints = sorted((folder / "checkpoints").glob(f"*{SUFFIX}"))
    # A run that was killed at once may have left its log and empty folders. The other processes find the first one's.
    is_run = bool(checkpoints) or (folder / CONFIG).is_file() or rank_zero_only.rank != 0
    own = {CONFIG.parent.name, "checkpoints", f"{HydraConfig.get().job.name}.log"}
    if not is_run and folder.is_dir() and (foreign := sorted({path.name for path in folder.iterdir()} - own)):
        raise ValueError(
            f"{folder} holds other files than a run's, such as {foreign[0]}, and the run's would be mixed into them. "
            "Name an empty or a new folder: output_dir=... or name=..."
        )
    if not cfg.overwrite and (there := [path for path in [*trained, *checkpoints] if path.exists()]):
        raise ValueError(
            f"{folder} holds an earlier run ({there[0]}). Go on with it by ckpt_path=last, give this one "
            "another name=, or replace it with overwrite=true."
        )


def _built(trainer: DictConfig) -> Any:
    """What makes the trainer; Lightning's refusals, of a dozen types, as ValueErrors, and more processes than cores."""
    from lightning.pytorch.accelerators import CPUAccelerator

    make = instantiate(trainer, _convert_="all")

    def build(**given: Any) -> Any:
        try:
            made = make(**given)
        except Exception as error:
            raise ValueError(f"The trainer cannot be made: {' '.join(str(error).split())}") from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if isinstance(made.accelerator, CPUAccelerator) and made.num_devices > cores:
            raise ValueError(
                f"trainer.devices is {made.num_devices}, but this CPU has {cores} cores: the processes would wait for "
                f"one another. Set trainer.devices to at most {cores}."
            )
        return made

    return build


@contextmanager
def _run_folder(cfg: DictConfig, *, goes_on: bool) -> Iterator[list[Any]]:
    """The run's folder, with its log and configuration; gone again if the run ends before its first step.

    Args:
        goes_on: the log that is there is this run's own.

    Raises:
        ValueError: another run has it.

    Yields:
        A list that takes the trainer, as soon as there is one.
    """
    from lightning.pytorch.utilities import rank_zero_only

    folder, trainers = Path(cfg.output_dir), []
    is_new = rank_zero_only.rank == 0 and not (folder.is_dir() and any(folder.iterdir()))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = ExitStack()
    # Set for every process of a run but where Lightning starts the others itself; its own rank comes later than this.
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")):
        held.callback(os.close, _only_run_in(folder))
    job = HydraConfig.get().job.name  # of its own for each process
    log = logging.FileHandler(folder / f"{job}.log", mode="a" if goes_on else "w", encoding="utf-8")
    logging.getLogger().addHandler(log)
    try:
        if rank_zero_only.rank == 0:
            (folder / CONFIG).parent.mkdir(exist_ok=True)
            OmegaConf.save(cfg, folder / CONFIG)
            OmegaConf.save(HydraConfig.get().overrides.task, (folder / CONFIG).with_name("overrides.yaml"))
        yield trainers
    except BaseException as error:
        trainer = trainers[0] if trainers else None
        # The other processes of this machine would wait for this one in a collective operation.
        if trainer is not None and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if is_new and not (trainer is not None and trainer.global_step):
            shutil.rmtree(folder)
            for path in made[1:]:
                if not any(path.iterdir()):
                    path.rmdir()
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning exits without a word
        raise
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
        held.close()


def _only_run_in(folder: Path) -> int:
    """Locks the folder until the returned descriptor is closed or the process ends."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise ValueError(
            f"Another run writes to {folder} now. Wait for its end, or give this one another name."
        ) from None
    except OSError:
        pass  # a file system without locks
    return number


def _check_earlier_runs(task: DictConfig) -> None:
    """Some experiments start from what another one leaves in its output_dir.

    Raises:
        ValueError: it is not there.
    """
    names = {path.stem for path in _experiments(str(Path(__file__).parent / "conf"))}
    for key in ("base_model", "init_from"):
        path = task.get(key)
        found = re.match(r"outputs/(\w+)/", path) if isinstance(path, str) else None
        if found and not Path(path).exists() and found[1] in names:
            raise ValueError(
                f"task.{key}={path} is not there: it is what python train.py experiment={found[1]} leaves. "
                f"Run that first, or set task.{key}."
            )


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with SCRIPT.errors():
        train(cfg)


def _called_now(message: str) -> str | None:
    """What to set instead, where the message is about a key of version 0.1; Hydra has never heard of that."""
    if "'task.context_encoder.beside'" in message:
        return "task.context_encoder.beside is called task.context_encoder.concat_layer now."
    if "'task.hypernetwork.join_ridge'" in message:
        return "task.hypernetwork.join_ridge is called task.ridge now."
    if found := re.search(r"'(task\.(?:validation_)?stages\.[\w.]*?)(\w+)'", message):
        from hypernet.data.curriculum import RENAMED_STAGE_KEYS

        place, name = found.groups()
        return f"{place}{name} is called {RENAMED_STAGE_KEYS[name]} now." if name in RENAMED_STAGE_KEYS else None
    if found := re.search(r"'task\.objective\.(\w+)'", message):
        from hypernet.training.losses import RENAMED, renamed

        return renamed(found[1]) if found[1] in RENAMED else None
    return None


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parent / "conf/train.yaml")
