"""python -m benchmarks.serving: see benchmarks.serving.load."""

import logging
from pathlib import Path

import hydra

from benchmarks.measuring.rows import Row, show_and_write
from benchmarks.serving.load import WAYS, LoadSettings, markdown, measure
from hypernet.cli.scripts import Script

SCRIPT = Script("benchmarks.serving", LoadSettings)


@hydra.main(config_path="../../conf", config_name="serving_load", version_base="1.3")
@SCRIPT
def main(cfg: LoadSettings) -> None:
    if unknown := [way for way in cfg.ways if way not in WAYS]:
        raise ValueError(f"There is no way {unknown[0]!r}. There are {', '.join(WAYS)}.")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    rows: list[Row] = []
    show_and_write((rows.append(row) or row for row in measure(cfg)), cfg.output, config=cfg.model_dump())
    print(markdown(rows))


if __name__ == "__main__":
    SCRIPT.run(main, Path(__file__).parents[2] / "conf/serving_load.yaml")
