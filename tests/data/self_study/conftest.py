"""Texts, settings and an engine that the tests of self-study share, and one finished run."""

import pytest

from hypernet.base.base_model import load_base_model
from hypernet.data.encyclopedia import Encyclopedia
from hypernet.data.self_study.engines import TransformersEngine
from hypernet.data.self_study.settings import StudySettings
from hypernet.data.self_study.study import study

NUM_DOCUMENTS = 10


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder of texts."""
    folder = tmp_path_factory.mktemp("notes")
    for i in range(NUM_DOCUMENTS):
        text = Encyclopedia("train").record(i, num_facts=6).document
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(tiny_base_model_folder):
    return TransformersEngine(*load_base_model(tiny_base_model_folder), batch_size=64)


@pytest.fixture(scope="module")
def settings(notes, tiny_base_model_folder, tmp_path_factory):
    """settings(**changes)"""

    def make(**changes):
        values = {
            "output_dir": str(tmp_path_factory.mktemp("study")),
            "base_model": str(tiny_base_model_folder),
            "documents": str(notes),
            "questions_per_chunk": 2,
            "max_chunk_tokens": 40,
            "max_question_tokens": 6,
            "max_answer_tokens": 5,
            "top_k": 4,
            "chunks_per_shard": 8,
        }
        return StudySettings(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def studied(settings, engine):
    """(settings, shards) of one run."""
    made = settings()
    return made, study(made, answerer=engine)
