"""Train a hypernetwork, or the tiny base model that it adapts. `python train.py --help` says what can be set."""

import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def train(cfg: DictConfig) -> None:
    """Builds what `cfg.task` describes and fits it, from `cfg.ckpt_path` if that is given."""
    import lightning
    import torch

    # Of what Lightning says by itself only warnings matter here, and not that the frozen base model is in eval mode.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=".*treespec")
    warnings.filterwarnings("ignore", message=".*sync_dist=True")  # every process validates on all of it
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of tensors of a few numbers

    from hypernet.training.callbacks import StepProgressBar
    from hypernet.training.run_state import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint

    if "experiment" in cfg:
        raise ValueError(
            "The experiment's file should begin with the line '# @package _global_'. If it does, a byte order mark "
            "hides it: save the file as UTF-8 without one."
        )
    _check_earlier_runs(cfg.task)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.output_dir = HydraConfig.get().runtime.output_dir  # each run of a sweep has a folder of its own
    checkpoints = Path(cfg.output_dir) / "checkpoints"
    ckpt_path = find_checkpoint(cfg.ckpt_path, checkpoints)
    lightning.seed_everything(cfg.seed, verbose=False)
    module, data = instantiate(cfg.task, _convert_="all")
    data.num_workers, data.worker_timeout_s = cfg.num_workers, cfg.worker_timeout_s
    saving = RunCheckpoint(
        checkpoints,
        every_n_train_steps=cfg.checkpoint_every,
        keep=cfg.keep_checkpoints,
        config=OmegaConf.to_container(cfg, resolve=True),
    )
    watching = [callback for callback in instantiate(cfg.callbacks, _convert_="all").values() if callback]
    if cfg.trainer.enable_progress_bar:
        watching.append(StepProgressBar())
    trainer = instantiate(cfg.trainer, _convert_="all")(
        logger=instantiate(cfg.logger),
        callbacks=[*watching, saving],
        plugins=[SafetensorsCheckpointIO()],
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except BaseException:
        # The other processes of this machine would wait for this one in a collective operation.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


def _check_earlier_runs(task: DictConfig) -> None:
    """Some experiments start from what another one leaves in its output_dir.

    Raises:
        ValueError: it is not there.
    """
    experiments = Path(__file__).parent / "conf" / "experiment"
    for key in ("base_model", "init_from"):
        path = task.get(key)
        found = re.match(r"outputs/(\w+)/", path) if isinstance(path, str) else None
        if found and not Path(path).exists() and (experiments / f"{found[1]}.yaml").is_file():
            raise ValueError(
                f"task.{key}={path} is not there: it is what python train.py experiment={found[1]} leaves. "
                f"Run that first, or set task.{key}."
            )


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        train(cfg)
    except (ValueError, OSError, FloatingPointError) as error:
        _give_up(str(error), error)
    except InstantiationException as error:
        _give_up(" ".join(str(error.__cause__ or error).split()), error)


def _give_up(message: str, error: Exception) -> NoReturn:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise HydraException(message) from error  # an exit would take the sweep's other runs along
    sys.exit(f"train.py: {message}")


def run() -> None:
    """The command: `main`, with mistakes in its arguments told in one line too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises them instead of printing them
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        message = " ".join(str(error).partition("Config search path")[0].split())
        sys.exit(f"train.py: {_called_now(message) or message}")


def _called_now(message: str) -> str | None:
    """What to set instead, where the message is about a key of version 0.1; Hydra has never heard of that."""
    if "'task.context_encoder.beside'" in message:
        return "task.context_encoder.beside is called task.context_encoder.concat_layer now."
    if "'task.hypernetwork.join_ridge'" in message:
        return "task.hypernetwork.join_ridge is called task.ridge now."
    if found := re.search(r"'task\.objective\.(\w+)'", message):
        from hypernet.training.losses import RENAMED, renamed

        return renamed(found[1]) if found[1] in RENAMED else None
    return None


if __name__ == "__main__":
    run()
