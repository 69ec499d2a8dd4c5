"""The story that `make sleep` tells, with the shipped model, to its end: forgotten, rebuilt, purged."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.story(60)
def test_story_of_one_night_ends_as_told(commands, tmp_path):
    result = commands.run("examples/sleep_story.py", [str(tmp_path / "memory")], cwd=ROOT)
    assert result.code == 0, result.output
    told, night, morning, harmful, rolled_back, forgotten = result.stdout.split("\n\n")
    assert "0 of 5 right" in told and "passed the gate" in night
    assert [line.split()[0] for line in morning.splitlines()[1:]] == ["5", "0"]  # Alice, Bob
    assert " refused: " in harmful and "live weights unchanged: True" in harmful and "5 of 5 right" in harmful
    assert [line.split()[0] for line in rolled_back.splitlines()[1:]] == ["0", "5"]
    assert "rebuilt from the rest as w-" in forgotten and "4 of 5 right" in forgotten and "Gronmaburg," not in forgotten
    assert "'Gronmaburg' in the folder's bytes: False" in forgotten
