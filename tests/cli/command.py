"""The command `hypernet` in this process: hypernet("library", "list", "--directory", folder) is its exit status."""

from pathlib import Path

import pytest

from hypernet.cli.main import main


def hypernet(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code
