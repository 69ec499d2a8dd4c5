"""What sources share: counting tokens, and corrupt rows up to a limit."""

import pytest

from hypernet.data.sources import CorruptRows, count_tokens


def test_tokens_are_counted_without_special_ones(tiny_tokenizer):
    texts = ["Who is it?", "", "A long " * 600]
    assert count_tokens(texts, None) == [3, 0, 1200]
    expected = [len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert count_tokens(texts, tiny_tokenizer) == expected
    assert count_tokens([], tiny_tokenizer) == []


def test_corrupt_rows_are_counted_to_a_limit(caplog):
    corrupt = CorruptRows("a.jsonl", 2)
    corrupt.report(num_good=0)
    assert not caplog.records
    corrupt.skip("Row 3 is\nempty.")
    corrupt.skip("Row 9 is empty.")
    corrupt.report(num_good=7)
    assert caplog.messages == ["a.jsonl: 2 corrupt rows are left out; the first: Row 3 is empty."]
    with pytest.raises(ValueError, match="a.jsonl has more than 2 corrupt rows; the first: Row 3 is empty. Mend"):
        corrupt.skip("Row 11 is empty.")
    with pytest.raises(ValueError, match="a.jsonl has no row that can be used; the first: Row 3 is empty."):
        corrupt.report(num_good=0)
