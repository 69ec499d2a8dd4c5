"""Words of questions and texts: what is found, and that a question is never syntax."""

import random

import pytest

from hypernet.memory.retriever import Retriever
from hypernet.memory.store.full_text import query, ranked
from hypernet.memory.store.records import EVERYBODY, Draft, Filters
from hypernet.memory.store.times import now
from hypernet.memory.store.token_store import TokenStore

ALICE = Filters("alice")


@pytest.fixture
def found(store):
    """found(text, question): whether a memory of this text is found."""
    retriever = Retriever(store)

    def find(text: str, question: str) -> bool:
        (ref,) = store.add([Draft(text=text, filters=ALICE)])
        return ref.id in [hit.id for hit in retriever.search(question, ALICE)]

    return find


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("She was taught by Orla.", "Who is teaching? Orla?"),
        ("Ihre Straße ist lang.", "STRASSE"),
        ("Café Müller", "cafe muller"),
        ("我住在东京，喜欢寿司", "东京"),
        ("我住在东京，喜欢寿司", "她喜欢吃寿司吗？"),
        ("私は寿司が好きです", "寿司"),
        ("서울에서 살아요", "서울"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("हिन्दी में लिखा", "हिन्दी"),
        ("Привет, мир", "МИР"),
        ("call me on 555-0100", "555"),
    ],
)
def test_text_is_found_in_any_script(found, text, question):
    assert found(text, question)


@pytest.mark.parametrize("question", ["京都", "brother", "東"])
def test_text_without_the_words_is_not_found(found, question):
    assert not found("我住在东京 her mother", question)


@pytest.mark.parametrize(
    "question",
    [
        'say "hello',
        "hello*",
        "hello AND",
        "NOT hello",
        "hello OR (",
        "NEAR(hello, 2)",
        "text:hello",
        "scope:hello",
        "hello^2 -x",
        "'; DROP TABLE memories; --hello",
        "hello\x00world",
        "h\ud800ello hello",
        "{hello} : + hello",
        "hello " * 5000,
        " ".join(f"w{i}" for i in range(200)) + " hello",
    ],
)
def test_question_is_words_never_syntax(found, question):
    assert found("hello there", question)


@pytest.mark.parametrize("question", ["", "   ", '"', "*", "???", "🎉", "\n"])
def test_question_without_words_finds_nothing(found, question):
    assert query(question) == "" and not found("hello there", question)


def test_filters_hold_without_the_words_of_the_scope(store, monkeypatch):
    """The index only narrows; the columns decide, even if every user's word were the same."""
    monkeypatch.setattr("hypernet.memory.store.full_text._scope", lambda filters: ["same"])
    store.add([Draft(text="hello", filters=Filters(user, run_id="1")) for user in ("alice", "bob")])
    assert [hit.user_id for hit in Retriever(store).search("hello", ALICE)] == ["alice"]
    assert Retriever(store).search("hello", Filters("alice", run_id="2")) == []


def test_ranking_is_that_of_fts5(tmp_path, schema):
    """PostgreSQL has no bm25 of its own: ours and SQLite's give the same order to 60 questions of everybody's memories
    and of one user's, ties included; also after some were deleted, and some of these restored."""
    rng = random.Random(0)
    vocabulary = [f"{stem}{end}" for stem in "teach walk relat café straße über".split() for end in ("", "ing", "ed")]
    vocabulary += ["the", "of", "not", "东", "京", "555", "ion", "ies"]
    whose = [EVERYBODY, ALICE, Filters("alice", run_id="1"), Filters("bob", agent_id="a", run_id="1")]
    drafts = [
        Draft(
            text=" ".join(rng.choices(vocabulary, k=rng.randrange(1, 30))), id=f"m{number}", filters=rng.choice(whose)
        )
        for number in range(120)
    ]
    stores = [TokenStore(tmp_path / "sqlite"), TokenStore(tmp_path / "postgresql", database=schema())]
    for store in stores:
        store.add(drafts)

    def check_order() -> None:
        for _ in range(60):
            question, filters = " ".join(rng.sample(vocabulary, rng.randrange(1, 5))), rng.choice(whose)
            found = []
            for store in stores:
                with store.database.read() as connection:
                    found.append(ranked(connection, question, filters, as_of=now(), known_at=None, limit=100))
            assert found[0] == found[1] and found[0], question

    check_order()
    for store in stores:
        for number in range(0, 120, 6):
            store.delete(f"m{number}")
        for number in range(0, 120, 12):
            store.restore(f"m{number}")
        store.purge()
    check_order()
    for store in stores:
        assert store.verify() == ((), ())
        store.close()
