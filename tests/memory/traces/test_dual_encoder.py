"""The towers: at first the base model's embedder, then trained on labels against values by hand, to the same bits."""

import math

import numpy as np
import pytest
import torch

from hypernet.memory.ask import Effect
from hypernet.memory.embedding import BaseModelEmbedder, question_vectors
from hypernet.memory.memory import Memory
from hypernet.memory.store.records import Filters
from hypernet.memory.store.schema import vectors
from hypernet.memory.traces.dual_encoder import DualEmbedder, DualEncoder, DualTraining, shuffled, targets
from hypernet.memory.traces.kept import DUAL, is_stale
from hypernet.memory.traces.trace_store import Example, TraceStore
from hypernet.memory.traces.trained import TrainedRetriever
from tests.memory.traces.test_traces import answered

NAMES = ("Fenda", "Tolmar", "Norbach", "Ilda", "Renwick", "Corba")
SHORT = DualTraining(steps=12, batch_size=8, hidden_dim=8, lr=0.01)


@pytest.fixture
def base(make_doc_to_lora):
    model = make_doc_to_lora()
    return BaseModelEmbedder(model.base_model, model.tokenizer)


def pair(name):
    return f"Registers record the birth of {name}.", f"{name} owns a boat."


def examples(names=NAMES, user_id="alice"):
    """Where is asked for a birth: the first of each pair."""
    found = [Example(f"Where was {name} born?", pair(name), (6.0, 0.1), user_id) for name in names]
    return sorted(found, key=lambda one: one.question)


def test_untrained_towers_are_the_base_models_embedder(base):
    embedder = DualEmbedder(base, DualEncoder(dim=base.dim, hidden_dim=8).eval())
    texts = [*pair("Fenda"), "Who?", "", "Fenda " * 700]
    for own in (embedder.embed(texts), embedder.embed_questions(texts)):
        assert np.allclose(own, base.embed(texts), atol=1e-5)
    assert embedder.embed([]).shape == (0, base.dim)


def test_labels_are_those_computed_by_hand():
    own = [Example("a?", ("x", "y"), (2.0, 0.0)), Example("b?", ("y", "z"), (1.0, 1.0))]
    share = math.exp(2) / (math.exp(2) + 1)
    expected = [[share, 1 - share, 0.0], [0.0, 0.5, 0.5]]
    assert torch.allclose(targets(own, ["x", "y", "z"], temperature=1.0), torch.tensor(expected))
    sharper = math.exp(4) / (math.exp(4) + 1)
    assert targets(own, ["x", "y", "z"], temperature=0.5)[0, 0].item() == pytest.approx(sharper)


def test_training_finds_the_memory_that_moved_answers(base):
    embedder = DualEmbedder(base, DualTraining(steps=80, batch_size=6, hidden_dim=16, lr=0.01).train(base, examples()))
    names = ("Vornia", "Walmoor")  # never trained on
    for name in names:
        asked = embedder.embed_questions([f"Where was {name} born?"])[0]
        born, boat = embedder.embed(pair(name))
        assert asked @ born > asked @ boat


def test_shuffled_labels_hold_the_same_effects():
    mixed = shuffled(examples() * 4, seed=0)
    assert all(sorted(one.effects) == [0.1, 6.0] for one in mixed)
    assert len({one.effects for one in mixed}) == 2


def test_prompts_that_moved_nothing_teach_nothing(base):
    flat = [Example("a?", ("x", "y"), (0.2, 0.1)), Example("b?", ("x",), (9.0,))]
    assert SHORT.usable([*flat, *examples()]) == examples()
    with pytest.raises(ValueError, match="No trace says which memory"):
        SHORT.train(base, flat)


def test_same_examples_train_the_same_bits(base):
    one, same = (SHORT.train(base, examples()) for _ in range(2))
    other = SHORT.train(base, examples()[:-1])
    assert one.sha256 == same.sha256 != other.sha256


def test_encoder_comes_back_from_its_file(base, tmp_path):
    encoder = SHORT.train(base, examples())
    encoder.save(tmp_path / "encoder.safetensors")
    assert DualEncoder.load(tmp_path / "encoder.safetensors").sha256 == encoder.sha256
    with pytest.raises(ValueError, match="embeddings of width 7"):
        DualEmbedder(base, DualEncoder(dim=7, hidden_dim=8))


def test_other_embedders_embed_questions_as_texts(base):
    assert np.array_equal(question_vectors(base, ["Who?"]), base.embed(["Who?"]))


@pytest.mark.parametrize("settings", [{"steps": 0}, {"lr": 0.0}, {"temperature": math.inf}])
def test_impossible_training_is_refused(settings):
    with pytest.raises(ValueError, match="Give"):
        DualTraining(**settings)


# Kept in a memory, and trained anew when traces go


def told(memory, names, user_id):
    """Memories with a trace for each name."""
    for name in names:
        refs = [memory.add(text, user_id=user_id) for text in pair(name)]
        moved = [
            Effect(
                **{"memory": str(ref), "text": "", "valid_at": "", "invalid_at": None, "rank": 1, "entry": None},
                log_p=-1.0,
                log_p_without=-1.0 - by,
            )
            for ref, by in zip(refs, (6.0, 0.1), strict=True)
        ]
        question = answered(f"Where was {name} born?", refs, user_id=user_id)
        TraceStore(memory.store).record(question, moved)


@pytest.fixture
def open_memory(tmp_path, database):
    opened = []

    def make(name):
        opened.append(Memory.open(tmp_path / name, database=database if not opened else None))
        return opened[-1]

    yield make
    for memory in opened:
        memory.close()


def trained(memory, base, **settings):
    return TrainedRetriever(memory.store, base, training=SHORT, min_examples=2, **settings)


def bytes_of(memory):
    return {path.name: path.read_bytes() for path in (memory.store.folder / "retriever").glob("*")}


@pytest.mark.parametrize("way", ["traces", "memories", "purged"])
def test_without_a_user_it_is_as_if_never_told(open_memory, base, way):
    both, alone = open_memory("both"), open_memory("alone")
    told(both, NAMES[:2], "bob")
    told(both, NAMES[2:], "alice")
    told(alone, NAMES[2:], "alice")
    with_bob, without = trained(both, base), trained(alone, base)
    before, expected = with_bob.embedder().name, without.embedder().name
    assert before != expected
    if way == "traces":
        assert with_bob.delete_traces(Filters("bob")) == 4
    else:
        both.delete_all(user_id="bob")
        assert is_stale(both.store) and both.status()["is_unfinished"]
        if way == "purged":
            both.purge()
            assert not bytes_of(both) and not both.status()["is_unfinished"]
    assert with_bob.embedder().name == expected
    assert bytes_of(both) == bytes_of(alone)


def test_search_uses_the_encoder_and_leaves_no_vectors(open_memory, base):
    memory = open_memory("memory")
    told(memory, NAMES, "alice")
    retriever = trained(memory, base)
    memory.retriever.embedder = retriever.embedder()
    memory.retriever.dense_weight = 1e6
    assert memory.search("Where was Ilda born?", user_id="alice", limit=1)[0].text == pair("Ilda")[0]

    def kept():
        with memory.store.database.read() as connection:
            return [row.embedder for row in connection.execute(vectors.select())]

    assert {DUAL in name for name in kept()} == {True}
    memory.delete_all(user_id="alice")
    assert retriever.embedder() is None and kept() == [] and not bytes_of(memory)


def test_more_traces_are_trained_on_when_they_have_grown(open_memory, base):
    memory = open_memory("memory")
    told(memory, NAMES[:2], "alice")
    retriever = trained(memory, base, growth=2.0)
    first = retriever.embedder().name
    told(memory, NAMES[2:3], "alice")
    assert retriever.embedder().name == first
    told(memory, NAMES[3:4], "alice")
    assert retriever.embedder().name != first


def test_too_few_traces_train_nothing(open_memory, base):
    memory = open_memory("memory")
    told(memory, NAMES[:1], "alice")
    assert trained(memory, base).embedder() is None and not bytes_of(memory)


def test_verify_takes_away_what_saw_deleted_traces(open_memory, base):
    memory = open_memory("memory")
    told(memory, NAMES, "alice")
    trained(memory, base).embedder()
    memory.delete_all(user_id="alice")
    assert any("trained retriever" in line for line in memory.verify().repaired) and not bytes_of(memory)
