"""Train a hypernetwork, or the tiny base model that it adapts. `python train.py --help` says what can be set."""

import logging
import os
import sys
import warnings
from pathlib import Path

import hydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


def train(cfg: DictConfig) -> None:
    """Builds what `cfg.task` describes and fits it, from `cfg.ckpt_path` if that is given."""
    import lightning
    import torch

    # Of what Lightning says by itself only warnings matter here, and not that the frozen base model is in eval mode.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=".*treespec")

    from hypernet.base_model import hush_torchao
    from hypernet.checkpoint_io import RunCheckpoint, SafetensorsCheckpointIO, find_checkpoint

    hush_torchao()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    checkpoints = Path(cfg.output_dir) / "checkpoints"
    ckpt_path = find_checkpoint(cfg.ckpt_path, checkpoints)
    lightning.seed_everything(cfg.seed, verbose=False)
    module, data = instantiate(cfg.task, _convert_="all")
    trainer = instantiate(cfg.trainer, _convert_="all")(
        logger=instantiate(cfg.logger),
        callbacks=[RunCheckpoint(dirpath=checkpoints, every_n_train_steps=cfg.checkpoint_every, save_last=True)],
        plugins=[SafetensorsCheckpointIO()],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        train(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except InstantiationException as error:
        sys.exit("train.py: " + " ".join(str(error.__cause__ or error).split()))


def run() -> None:
    """The command: `main`, with mistakes in its arguments told in one line too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises them instead of printing them
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        sys.exit("train.py: " + " ".join(str(error).partition("Config search path")[0].split()))


if __name__ == "__main__":
    run()
