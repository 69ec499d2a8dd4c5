"""Retriever: words and vectors, whose and when, against embedders and rankings made by hand."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sqlalchemy import text

from hypernet.memory.retriever import RANK_OFFSET, Retriever
from hypernet.memory.store.records import Draft, Filters
from hypernet.memory.store.token_store import TokenStore

ALICE, BOB = Filters("alice"), Filters("bob")


class Axes:
    """The first letter of a text chooses its axis; texts of one letter are each other's neighbours."""

    name = "axes"

    def __init__(self):
        self.texts: list[str] = []

    def embed(self, texts):
        self.texts += texts
        vectors = np.full((len(texts), 26), 1e-3, np.float32)
        vectors[np.arange(len(texts)), [ord(content[0].lower()) - 97 for content in texts]] = 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path):
    store = TokenStore(tmp_path / "memory")
    yield store
    store.close()


def add(store: TokenStore, *contents: str, filters: Filters = ALICE, **fields):
    return store.add([Draft(text=content, filters=filters, **fields) for content in contents])


def found(retriever: Retriever, question: str, filters: Filters = ALICE, **settings) -> list[str]:
    return [hit.text for hit in retriever.search(question, filters, **settings)]


def test_hit_says_what_an_agent_needs_to_forget_it(store):
    (ref,) = add(store, "Orla taught Fenda", source="notes.md", valid_at="2026-01-01", invalid_at="2100-01-01")
    (hit,) = Retriever(store).search("Who taught Fenda?", ALICE)
    assert (hit.id, hit.version, hit.ref, hit.source) == (ref.id, 1, str(ref), "notes.md")
    assert (hit.valid_at[:10], hit.invalid_at[:10]) == ("2026-01-01", "2100-01-01") and hit.score > 0
    store.delete(hit.id)
    assert Retriever(store).search("Who taught Fenda?", ALICE) == []


def test_scores_are_reciprocal_ranks_of_both_rankings(store):
    add(store, "pear tree", "plum jam", "quince plum plum")
    hits = Retriever(store, embedder=Axes(), dense_weight=0.5).search("plum", ALICE)
    # Words: the third has the word twice, the second is shorter; vectors: the first two share the letter.
    words = {hit.text: rank for rank, hit in enumerate(Retriever(store).search("plum", ALICE), 1)}
    vectors = {"plum jam": 1, "pear tree": 2, "quince plum plum": 3}
    for hit in hits:
        expected = 0.5 / (RANK_OFFSET + vectors[hit.text])
        expected += 1 / (RANK_OFFSET + words[hit.text]) if hit.text in words else 0
        assert hit.score == pytest.approx(expected)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_vectors_find_what_shares_no_word(store):
    add(store, "apple", "banana", "cherry")
    assert found(Retriever(store), "berry") == []
    assert found(Retriever(store, embedder=Axes()), "berry")[0] == "banana"


@pytest.mark.parametrize("embedder", [None, Axes()], ids=["words", "both"])
def test_search_returns_nothing_of_another_user(store, embedder):
    for user in "abcde":
        add(store, *(f"common word {n}" for n in range(30)), filters=Filters(user, "agent", f"run {user}"))
    retriever = Retriever(store, embedder=embedder)
    for user in "abcde":
        hits = retriever.search("common word", Filters(user), limit=100)
        assert len(hits) == 30 and {hit.user_id for hit in hits} == {user}
        assert len(retriever.search("common word", Filters(user, None, f"run {user}"), limit=100)) == 30
        assert retriever.search("common word", Filters(user, "another"), limit=100) == []
    assert len(retriever.search("common word", Filters(), limit=200)) == 150


@pytest.mark.parametrize("embedder", [None, Axes()], ids=["words", "both"])
def test_search_sees_what_held_and_what_was_known(store, embedder):
    retriever = Retriever(store, embedder=embedder)
    (ref,) = add(store, "home is Paris", valid_at="2026-01-01")
    then = store.get(ref.id, as_of="2026-01-02").created_at
    store.update(ref.id, "home is Rome", valid_at="2026-03-01")
    assert found(retriever, "home", as_of="2025-12-31") == []
    assert found(retriever, "home", as_of="2026-02-01") == ["home is Paris"]
    assert found(retriever, "home", as_of="2026-04-01") == ["home is Rome"]
    assert found(retriever, "home", as_of="2026-04-01", known_at=then) == ["home is Paris"]


@pytest.mark.parametrize("embedder", [None, Axes()], ids=["words", "both"])
def test_search_follows_every_change_of_another_connection(store, embedder):
    retriever = Retriever(store, embedder=embedder)
    other = TokenStore(store.folder)
    (ref,) = add(other, "a plum")
    assert found(retriever, "plum") == ["a plum"]
    add(other, "another plum")
    assert sorted(found(retriever, "plum")) == ["a plum", "another plum"]
    batch = other.delete(ref.id)
    assert found(retriever, "plum") == ["another plum"]
    other.rollback(batch.version)
    assert sorted(found(retriever, "plum")) == ["a plum", "another plum"]
    other.delete_all(ALICE)
    other.purge()
    assert found(retriever, "plum") == []


def test_texts_are_embedded_once_and_vectors_purged(store):
    embedder = Axes()
    add(store, "apple", "banana")
    for _ in range(2):
        found(Retriever(store, embedder=embedder), "cherry")
    assert sorted(embedder.texts) == ["apple", "banana", "cherry", "cherry"]
    store.delete_all(ALICE)
    store.purge()
    with store.database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM vectors")).scalar() == 0


def test_vectors_of_another_model_are_computed_anew(store):
    """A memory is text: any base model may open it, and nothing is lost."""
    add(store, "apple", "banana")
    first, second = Axes(), Axes()
    second.name = "other axes"
    for embedder in (first, second, first):
        assert found(Retriever(store, embedder=embedder), "bean")[0] == "banana"
    assert (len(first.texts), len(second.texts)) == (4, 3)


def test_contested_hit_names_the_others(tmp_path):
    store = TokenStore(tmp_path / "memory", conflict="keep_both")
    first, second = (add(store, f"home is {place}", subject="home", relation="is")[0] for place in ("Paris", "Rome"))
    hits = {hit.id: hit.conflicts for hit in Retriever(store).search("home", ALICE)}
    assert hits == {first.id: (str(second),), second.id: (str(first),)}


def test_threads_search_one_memory_at_once(store):
    for user in "abcdef":
        add(store, f"{user} plum", filters=Filters(user))
    retriever = Retriever(store, embedder=Axes())
    with ThreadPoolExecutor(6) as pool:
        hits = list(pool.map(lambda user: found(retriever, "plum", Filters(user)), "abcdef" * 10))
    assert hits == [[f"{user} plum"] for user in "abcdef" * 10]


def test_impossible_search_is_one_line(store):
    retriever = Retriever(store)
    for settings, message in (
        ({"limit": 0}, "limit is 0"),
        ({"as_of": "2026-02-30"}, "as_of is '2026-02-30'"),
        ({"known_at": "then"}, "known_at is 'then'"),
    ):
        with pytest.raises(ValueError, match=message):
            retriever.search("x", ALICE, **settings)
    with pytest.raises(ValueError, match="user_id is ''"):
        retriever.search("x", Filters(""))
