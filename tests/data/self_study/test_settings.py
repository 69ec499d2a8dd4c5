"""StudySettings: what is refused, and what decides the shards."""

import pytest

from hypernet.data.self_study.settings import StudySettings
from hypernet.data.sources import MAX_CORRUPT_ROWS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": ""}, "Give one of documents "),
        ({"dataset": "b"}, "Give one of documents "),
        ({"top_k": 0}, "top_k should be at least 1, got 0"),
        ({"process_index": 1}, "process_index is 1; it counts from 0 to num_processes - 1"),
        ({"engine": "x"}, "Unknown engine 'x'; choose transformers or vllm"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StudySettings(**{"output_dir": "a", "base_model": "b", "documents": "c", **changes})


def test_place_and_division_of_the_work_are_not_described():
    settings = StudySettings(output_dir="a", base_model="b", documents="c")
    other = StudySettings(output_dir="d", base_model="b", documents="c", num_processes=3, process_index=2, batch_size=1)
    assert settings.described() == other.described() and settings.described()["top_k"] == 16


def test_corrupt_rows_allowed_are_as_for_other_sources():
    assert StudySettings(output_dir="a", base_model="b", documents="c").max_corrupt_rows == MAX_CORRUPT_ROWS
