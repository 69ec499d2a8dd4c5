"""The story that `make memory` tells, with the shipped model; it can answer, so the answers are checked."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_story_of_examples_ends_as_told(commands, tmp_path):
    result = commands.run("examples/memory_story.py", [str(tmp_path / "memory")], cwd=ROOT)
    assert result.code == 0, result.output
    told, asked, measured, corrected, forgotten = result.stdout.split("\n\n")
    assert "5 adapters" in told
    assert "none     unknown\n  token    Olwin Corton\n  adapter  Olwin Corton" in asked
    effects = [float(line.split()[0]) for line in asked.splitlines() if "nats by" in line]
    assert effects[0] > 5 > abs(effects[1])
    assert "token    1.0 right" in measured and "adapter  1.0 right, 0 tokens" in measured
    assert "auto: " in measured and "cheapest with at least 0.8: 1.00 of 5" in measured
    before, after = corrected.split("as of 2026-07-01")
    assert "adapter  Olwin Corton" in before and "adapter  Ilmir Kordale" in after
    assert "to the bit: 5 of 5" in forgotten and "passed" in forgotten
    assert "none     unknown\n  token    unknown\n  adapter  unknown" in forgotten
    assert "after purge: False; verify: Verification(damage=(), repaired=())" in forgotten
