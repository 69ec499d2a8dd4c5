"""README and the model card state what the committed rows say."""

import pytest

from benchmarks.tables import FILES, ROOT, with_tables


@pytest.mark.parametrize("name", FILES)
def test_every_table_is_what_its_committed_rows_give(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- figures:" in text
    assert with_tables(text) == text, f"{name} differs from benchmarks/results; run python -m benchmarks.tables"


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = text.replace("| one chunk | adapter |", "| one chunk | adapter, surely |")
    assert changed != text
    assert with_tables(changed) == text
