"""Script: what train.py, generate_adapter.py and the benchmarks have in common as Hydra commands.

    SCRIPT = Script("benchmarks.trial", Trial)

    @hydra.main(config_path="../conf", config_name="trial", version_base="1.3")
    @SCRIPT
    def main(trial: Trial) -> None: ...             # with settings that have been checked

    if __name__ == "__main__":
        SCRIPT.run(main, CONF / "trial.yaml")

Mistakes are told in one line on standard error, before anything is done; --help explains the settings by the comments
of their YAML.
"""

import functools
import os
import re
import string
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from pydoc import locate
from typing import Any, Generic, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hypernet.cli.errors import BROKEN_PIPE, INTERRUPTED, LESS, one_line, one_line_warnings
from hypernet.cli.settings import S, arguments_of, checked, no_such_setting, wanted


class Script(Generic[S]):
    """A Hydra command.

    Args:
        name: in front of its messages.
        settings: their schema.
        renamed: settings of before (or choices, as sweep=crowd) and what says the same now.
        less: what to do where memory runs out.
    """

    def __init__(
        self, name: str, settings: type[S], *, renamed: Mapping[str, str] | None = None, less: str = LESS
    ) -> None:
        self.name = name
        self.settings = settings
        self.renamed = renamed or {}
        self.less = less

    def __call__(self, task: Callable[[S], None]) -> Callable[[DictConfig], None]:
        """`task` as Hydra calls it: with the settings checked, and with `errors` around it."""

        @functools.wraps(task)
        def main(cfg: DictConfig) -> None:
            with self.errors():
                task(self.check(cfg))

        return main

    def check(self, cfg: DictConfig) -> S:
        """The settings.

        Raises:
            ValueError: of one line, see `checked`.
        """
        return checked(self.settings, plain(cfg))

    @contextmanager
    def errors(self, *, in_task: bool = True) -> Iterator[None]:
        """Ends the process with one line on standard error instead of a traceback, for what the user can put right.

        Args:
            in_task: what Hydra calls, of which a sweep has several: one that fails does not end the others.
        """
        try:
            with one_line_warnings(self.name):
                yield
                sys.stdout.flush()
        except BrokenPipeError:  # who reads has had enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at exit
            sys.exit(BROKEN_PIPE)
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if (reason := self.explain(error)) is None:
                raise
            if in_task and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise HydraException(reason) from error
            sys.exit(f"{self.name}: {' '.join(reason.split())}")

    def explain(self, error: BaseException) -> str | None:
        """What is wrong and what to do, or None for a mistake of ours."""
        text = str(error)
        if isinstance(error, OverrideParseException):
            return (
                f"Cannot read the argument {error.override!r}. Settings are key=value, texts with special characters "
                "in double quotes, the whole argument in single quotes: 'ask=[\"Who, if anyone, taught her?\"]'. "
                "See --help."
            )
        if unknown := re.match(r"Could not override '(.+?)'", text):
            return self._no_such_setting(unknown[1])
        if merged := re.match(r"Error merging override ([\w.]+)=(.*)", text, re.DOTALL):
            key, value = merged.groups()
            field = self.settings.model_fields.get(key)
            return f"{key} should be {wanted(field) if field else 'of another type'}, got {value}."
        if ambiguous := re.match(r"Ambiguous value for argument '(.+?)=(.*)'", text):
            key, value = ambiguous.groups()
            return (
                f"Several values need brackets: '{key}=[{value}]'. A comma in a value needs quotes: "
                f"'{key}=\"{value}\"'."
            )
        if choice := re.search(
            r"Could not find '(.+)/(.+?)'\s+Available options in '.+?':((?:\s+\S+)+?)\s+Config", text
        ):
            group, name, there = choice.groups()
            return f"There is no {group} {name!r}. There are {', '.join(there.split())}; see --help."
        if isinstance(error, InstantiationException) and error.__cause__ is not None:
            return self.explain(error.__cause__) or text
        if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError)):
            return text.partition("Config search path")[0]
        return one_line(error, less=self.less)

    def run(self, main: Callable[[], None], config: Path) -> None:
        """The command: `main` with the mistakes in its arguments told in one line too.

        Args:
            main: what hydra.main made.
            config: its YAML, whose comments are the help.
        """
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises them instead of printing them
        with self.errors(in_task=False):
            for argument in sys.argv[1:]:
                self._check_argument(argument)
                _check_choice(argument, config.parent)
            _parser().parse_args()
            if {"--help", "-h"} & {*sys.argv[1:]}:
                print(help_of(config))
            else:
                main()

    def _check_argument(self, argument: str) -> None:
        name, _, value = argument.lstrip("+~-").partition("=")
        if argument.startswith("--") and name in self.settings.model_fields:
            raise ValueError(f"Settings have no dashes: write {name}={value or '...'} instead of {argument}.")
        for old in (name, f"{name}={value}"):
            if old in self.renamed:
                raise ValueError(self._no_such_setting(old))

    def _no_such_setting(self, name: str) -> str:
        if name in self.renamed:
            return f"There is no setting {name!r} any more: write {self.renamed[name]}. See --help."
        return no_such_setting(name, () if "." in name else list(self.settings.model_fields))


def _check_choice(argument: str, folder: Path) -> None:
    """Hydra has a traceback for some values that are no text where one of a folder's files is to be chosen.

    Raises:
        ValueError: of one line.
    """
    group = re.split("[=@]", argument.lstrip("+"))[0]
    files = sorted((folder / group).glob("*.yaml")) if re.fullmatch(r"\w+", group) else []
    if files and "=" in argument:
        override = OverridesParser.create().parse_override(argument)
        if not override.is_sweep_override() and not isinstance(override.value(), str):
            choices = ", ".join(file.stem for file in files)
            raise ValueError(f"{group} should be one of {choices}, got {argument.partition('=')[2]}; see --help.")


def _parser() -> ArgumentParser:
    """Hydra's own, which prints its usage for an option that there is not; this one raises a ValueError."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        said = f"There is no option {unknown.split()[0]}" if unknown != message else message[:1].upper() + message[1:]
        raise ValueError(f"{said}. Settings are key=value, without dashes; see --help.")

    parser.error = error  # type: ignore[method-assign]
    return parser


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The settings as plain values, `${...}` replaced by what it refers to."""
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def check_targets(values: Any, place: str = "") -> None:
    """Checks whatever the settings call (a mapping with `_target_`) against the signature of what is called.

    Raises:
        ValueError: of one line: it takes no such setting, or one of another type.
    """
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return
    if "_target_" in values:
        if not callable(target := locate(str(values["_target_"]))):
            raise ValueError(f"{place}._target_ should be a class or a function, got {values['_target_']!r}.")
        given = {name: value for name, value in values.items() if not name.startswith("_")}
        checked(arguments_of(target), given, place=place)
    for name, value in values.items():
        check_targets(value, f"{place}.{name}" if place else str(name))


def help_of(config: Path) -> str:
    """The help that a command's YAML has, below hydra.help; there $CONFIG stands for the settings with their comments,
    $APP_CONFIG_GROUPS for the choices with the first line of each one's file."""
    text = config.read_text(encoding="utf-8")
    settings = text.partition("\nhydra:")[0].partition("\ndefaults:")[2].partition("\n\n")[2]
    folders = sorted(path for path in config.parent.iterdir() if path.is_dir())
    groups = [path for path in folders if not any(below.is_dir() for below in path.iterdir())]
    return string.Template(yaml.safe_load(text)["hydra"]["help"]["template"]).substitute(
        CONFIG=settings.strip(), APP_CONFIG_GROUPS="\n".join(map(_choices, groups))
    )


def _choices(group: Path) -> str:
    files = sorted(group.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    return "\n".join([f"{group.name}=", *(_choice(file, width) for file in files)]) + "\n"


def _choice(file: Path, width: int) -> str:
    """Its name, and the first sentence of its first comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if not line.startswith("# @package")]
    comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), said))
    sentence = re.split(r"(?<=\.)\s", comment, maxsplit=1)[0].rstrip(".")
    head = f"  {file.stem:<{width}}  "
    return textwrap.fill(head + sentence, 78, subsequent_indent=" " * len(head)) if sentence else head.rstrip()
