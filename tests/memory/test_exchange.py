"""Files of other programs: read as written there, and round trips."""

import json

import pytest

from hypernet.io.files import replaced
from hypernet.memory.memory import Memory

MEM0 = {
    "results": [
        {
            **{"id": "bad4-1", "memory": "Likes chess", "hash": "ab12", "metadata": {"category": "hobby"}},
            **{"created_at": "2025-07-26T08:33:12.123456-07:00", "updated_at": None, "user_id": "alice"},
        },
        {"id": "bad4-2", "memory": "Lives in Rome", "user_id": "alice", "run_id": "chat-7", "score": 0.3},
    ]
}
GRAPHITI = [
    {
        **{
            "uuid": "e-1",
            "group_id": "alice",
            "source_node_uuid": "n-1",
            "target_node_uuid": "n-2",
            "name": "WORKS_AT",
        },
        **{"fact": "Alice works at Acme", "episodes": ["ep-1"], "created_at": "2025-02-01T00:00:00Z"},
        **{
            "valid_at": "2024-01-01T00:00:00Z",
            "invalid_at": "2025-01-01T00:00:00Z",
            "expired_at": "2025-02-01T00:00:00Z",
        },
    },
    {
        **{
            "uuid": "e-2",
            "group_id": "alice",
            "source_node_uuid": "n-1",
            "target_node_uuid": "n-3",
            "name": "WORKS_AT",
        },
        **{"fact": "Alice works at Initech", "created_at": "2025-02-01T00:00:00Z", "valid_at": "2024-06-01T00:00:00Z"},
    },
]
LETTA = {
    "blocks": [{"id": "block-1", "label": "human", "value": "Name: Alice", "limit": 5000}],
    "passages": [
        {"id": "passage-1", "text": "Alice plays chess", "created_at": "2025-03-01T00:00:00+00:00", "tags": ["hobby"]}
    ],
}


GOOD = '{"text": "good"}'


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.fixture
def memory(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    yield memory
    memory.close()


def imported(memory: Memory, tmp_path, content, *, format: str, **whose):
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return memory.import_jsonl(path, format=format, **whose)


def exported(memory: Memory, tmp_path, *, format: str) -> list[dict]:
    memory.export_jsonl(tmp_path / "out.jsonl", format=format)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_plain_export_read_back_gives_the_same_views(memory, tmp_path):
    home = {"user_id": "alice", "subject": "home", "relation": "is"}
    for place, day in (("Rome", "2026-03-01"), ("Paris", "2026-01-01")):
        memory.add(f"home is {place}", valid_at=day, metadata={"n": 1}, source="notes", **home)
    ref = memory.add("a guest stays", user_id="bob", valid_at="2026-01-01", invalid_at="2026-02-01")
    memory.update(ref, "another guest", valid_at="2026-01-10")
    memory.invalidate(ref, at="2026-01-20")
    memory.export_jsonl(tmp_path / "all.jsonl")
    other = Memory.open(tmp_path / "other")
    batch = other.import_jsonl(tmp_path / "all.jsonl")
    assert len(batch.memories) == 5
    stored = {"created_at", "expired_at"}  # when it was stored here is another time
    for day in ("2025-12-31", "2026-01-05", "2026-01-15", "2026-01-25", "2026-02-15", "2026-04-01"):
        views = [
            [{k: v for k, v in m.as_dict().items() if k not in stored} for m in one.list(as_of=day)]
            for one in (memory, other)
        ]
        assert views[0] == views[1]
    assert other.import_jsonl(tmp_path / "all.jsonl").memories == ()  # known ids are left out
    other.rollback(batch.version)
    assert other.list() == () and other.status()["memories"] == 0


def test_mem0_memories_keep_ids_dates_and_metadata(memory, tmp_path):
    batch = imported(memory, tmp_path, MEM0, format="mem0")
    assert batch.memories == ("bad4-1@1", "bad4-2@1")
    first, second = memory.list(user_id="alice")
    assert (first.text, first.valid_at) == ("Likes chess", "2025-07-26T15:33:12.123456+00:00")
    assert (first.metadata["category"], second.run_id, second.conflict) == ("hobby", "chat-7", "add_only")
    back = exported(memory, tmp_path, format="mem0")
    assert back[0]["hash"] == "ab12" and back[0]["metadata"] == {"category": "hobby"} and back[1]["score"] == 0.3
    assert [entry["memory"] for entry in back] == [entry["memory"] for entry in MEM0["results"]]


def test_graphiti_edges_keep_their_own_ends(memory, tmp_path):
    imported(memory, tmp_path, "\n".join(map(json.dumps, GRAPHITI)), format="graphiti")
    assert [m.text for m in memory.list(as_of="2024-03-01")] == ["Alice works at Acme"]
    assert len(memory.list(as_of="2024-09-01")) == 2  # one relation, and both were true
    (edge,) = exported(memory, tmp_path, format="graphiti")
    assert edge["uuid"] == "e-2" and edge["target_node_uuid"] == "n-3" and edge["name"] == "WORKS_AT"


def test_letta_blocks_and_passages_become_an_agents(memory, tmp_path):
    imported(memory, tmp_path, LETTA, format="letta", user_id="alice", agent_id="agent-1")
    found = {m.id: m for m in memory.list(user_id="alice", agent_id="agent-1")}
    assert found["block-1"].relation == "human" and found["passage-1"].metadata == {"letta": {"tags": ["hobby"]}}
    block, passage = sorted(exported(memory, tmp_path, format="letta"), key=lambda entry: entry["id"])
    assert (block["value"], block["limit"], passage["tags"]) == ("Name: Alice", 5000, ["hobby"])


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ('{"text": "a"}\nnot json\n', "plain", "line 2 is no JSON"),
        ('{"role": "a"}\n', "plain", "entry 1 is no memory of the format plain: text is missing"),
        ('{"memory": "a"}\n{"text": "a"}\n', "mem0", "line 2 is no memory of the format mem0: memory is missing"),
        ('{"text": "good"}\n{"text": "a", "valid_at": "2026-02-30"}\n', "plain", "valid_at is '2026-02-30'"),
        ('{"text": "a", "id": "x", "version": "one"}', "plain", "version is 'one'"),
        ("[1]", "plain", "entry 1 is 1"),
        ("5", "plain", "entry 1 is 5"),
        ('[\n{"text": "a"},\n{"text": b}]', "plain", "line 3 is no JSON"),
        (f'{GOOD}\n{{"text": "a", "id": "x", "version": {10**20}}}', "plain", f"line 2 .*version is {10**20}"),
        (f'{GOOD}\n{{"text": "a", "metadata": {{"n": {"9" * 5000}}}}}', "plain", "line 2 .*too many digits"),
        (f'{GOOD}\n{{"text": "a", "metadata": {{"n": NaN}}}}', "plain", "line 2 .*NaN is no number"),
        (f'{GOOD}\n{{"text": "a", "metadata": {{"n": 1e999}}}}', "plain", "line 2 .*metadata is no JSON"),
        (f'{GOOD}\n{{"text": "a", "metadata": {nested(33)}}}', "plain", "line 2 .*nested deeper than 32"),
        (f'{GOOD}\n{{"text": "a", "metadata": {nested(100_000)}}}', "plain", "line 2 .*nested too deeply"),
        (nested(100_000), "plain", "line 1 .*nested too deeply"),
        (f'{GOOD}\n{{"text": "a", "user_id": "\\ud800"}}', "plain", "line 2 .*half a character"),
        (f'{GOOD}\n{{"text": "\\ud800"}}', "plain", "line 2 .*half a character"),
        (f'{GOOD}\n{{"text": "a", "metadata": {{"\\udc00": 1}}}}', "plain", "line 2 .*half a character"),
        ('{"memory": "a", "metadata": {"n": ["\\ud800"]}}', "mem0", "file.json, entry 1 .*half a character"),
        (
            f'{GOOD}\n{{"text": "a", "valid_att": 1}}',
            "plain",
            "line 2 .*unknown key 'valid_att'. Known are id, version, t",
        ),
        ('{"text": "a", "user": "alice"}', "plain", "entry 1 .*unknown key 'user'. Known are .*user_id, agent_id"),
        (f'{GOOD}\n{{"text": "a", "sha256": "{"0" * 64}"}}', "plain", "line 2 .*its sha256 is another text's"),
        (f'{GOOD}\n{{"text": "a", "text": "b"}}', "plain", "line 2 .*the key 'text' stands twice"),
        ('[{"text": "a"}, {"text": "a", "metadata": {"n": 1, "n": 2}}]', "plain", "entry 2 .*key 'n' stands twice"),
        ('{"memory": "a", "score": 1, "score": 2}', "mem0", "entry 1 .*key 'score' .*twice"),
        ('{"results": [], "results": [{"memory": "a"}]}', "mem0", "entry 1 has the key 'results' twice"),
        ('{"text": "a", "metadata": []}', "plain", r"entry 1 .*metadata is no JSON object: it is \[\]"),
        ('{"text": "a", "metadata": ""}', "plain", "entry 1 .*metadata is no JSON object: it is ''"),
        ('{"text": "a", "metadata": false}', "plain", "entry 1 .*metadata is no JSON object: it is False"),
        ('{"text": "a", "id": 5}', "plain", "entry 1 .*id is 5. Give a text"),
        ('{"text": "a", "id": ""}', "plain", "entry 1 .*id is ''. Give a text"),
        (f'{GOOD}\n{{"text": "a", "id": "\\u001b[2J"}}', "plain", "line 2 .*is no memory's id"),
        (f'{GOOD}\n{{"text": "\\ufeff"}}', "plain", "line 2 .*A memory is a text"),
        ('{"id": "x", "memory": "a"}\n\n{"id": "x", "memory": "b"}', "mem0", "line 3 says something else .* line 1"),
        ("[]", "zep", "Unknown format 'zep': choose one of plain, mem0"),
    ],
)
def test_unreadable_file_is_one_line_and_adds_nothing(memory, tmp_path, content, format, message):
    with pytest.raises(ValueError, match=message) as error:
        imported(memory, tmp_path, content, format=format)
    assert "\n" not in str(error.value) and memory.list() == () and memory.versions() == ()
    assert not str(error.value).endswith("..")


@pytest.mark.parametrize(("content", "line"), [(b"caf\xe9", 1), (b'{"text": "a"}\r\n\n{"text": "\xc3("}', 3)])
def test_bytes_that_are_no_utf8_are_named_by_line(memory, tmp_path, content, line):
    (path := tmp_path / "file.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"file.jsonl, line {line} is not UTF-8"):
        memory.import_jsonl(path)


def test_import_of_nothing_new_leaves_no_batch(memory, tmp_path):
    twice = '{"id": "x", "text": "a"}\n{"id": "x", "text": "a"}\n{"id": "y", "text": "b"}\n'
    first = imported(memory, tmp_path, twice, format="plain")
    assert (first.version, first.memories, first.num_known) == ("v1", ("x@1", "y@1"), 1)
    again = imported(memory, tmp_path, twice, format="plain")
    assert (again.version, again.memories, again.num_known) == ("", (), 3)
    assert imported(memory, tmp_path, "", format="plain") == imported(memory, tmp_path, "[]", format="mem0")
    assert [batch["version"] for batch in memory.versions()] == ["v1"]


ENTRIES = {"plain": {"text": "a"}, "mem0": {"memory": "a"}, "graphiti": {"fact": "a"}, "letta": {"text": "a"}}
OWNERS = {"plain": "user_id", "mem0": "user_id", "graphiti": "group_id", "letta": "agent_id"}


@pytest.mark.parametrize("format", ENTRIES)
def test_file_of_another_user_is_not_imported_as_ones_own(memory, tmp_path, format):
    """Neither into bob's memories, as the file says, nor into alice's, as is asked."""
    name = "agent_id" if format == "letta" else "user_id"
    rows = [ENTRIES[format], ENTRIES[format] | {OWNERS[format]: "bob"}]
    with pytest.raises(ValueError, match=f"Memory 2 of the file has {name} 'bob', and 'alice' was given") as error:
        imported(memory, tmp_path, rows, format=format, **{name: "alice"})
    assert "\n" not in str(error.value) and memory.list() == ()
    assert len(imported(memory, tmp_path, rows, format=format, **{name: "bob"}).memories) == 2
    assert [getattr(found, name) for found in memory.list()] == ["bob", "bob"]


def test_hits_and_listed_memories_can_be_imported(memory, tmp_path):
    """What `search --json`, and `GET /v1/memories` with its tiers, print."""
    memory.add("Orla taught Fenda.", user_id="alice", valid_at="2026-01-01")
    (hit,) = memory.search("Who taught Fenda?")
    rows = [hit.as_dict(), *({**m.as_dict(), "ref": m.ref, "tiers": ["token"]} for m in memory.list())]
    assert {"score", "conflicts"} <= set(rows[0])
    other = Memory.open(tmp_path / "other")
    assert len(imported(other, tmp_path, rows, format="plain").memories) == 1
    (found,) = other.list()
    assert (found.text, found.user_id, found.valid_at) == (hit.text, "alice", hit.valid_at)
    other.close()


def test_odd_texts_and_metadata_come_back_from_an_export(memory, tmp_path):
    deepest = json.loads(nested(32))
    for text in ("one\u2028line \x85 of \x1b[2J many\r\n", "nul \0 inside", "\ufeffmarked"):
        memory.add(text, metadata={"n": 2**70, "x": -0.5, "none": None})
    memory.add("deep", metadata=deepest)
    memory.export_jsonl(tmp_path / "all.jsonl")
    other = Memory.open(tmp_path / "other")
    other.import_jsonl(tmp_path / "all.jsonl")
    assert [(m.text, m.metadata) for m in other.list()] == [(m.text, m.metadata) for m in memory.list()]
    assert other.list()[-1].metadata == deepest and other.search("many")[0].metadata["n"] == 2**70


def test_file_written_by_hand_needs_text_alone(memory, tmp_path):
    imported(memory, tmp_path, '\ufeff{"text": "a", "invalid_at": "2100-01-01"}\n\n{"text": "b"}\n', format="plain")
    assert [(m.text, m.invalid_at and m.invalid_at[:4]) for m in memory.list()] == [("a", "2100"), ("b", None)]


@pytest.mark.parametrize(
    "target",
    [
        "memory/memory.sqlite",
        "memory/deletions.jsonl",
        "memory/.lock",
        "memory/adapters/new/all.jsonl",
        "memory/../memory/all.jsonl",
        "link/memory.sqlite",
        "to_database",
        "memory/outwards",
        "other/memory.sqlite",
    ],
)
def test_export_into_a_memory_is_refused(memory, tmp_path, target):
    memory.add("one")
    Memory.open(tmp_path / "other").close()
    (tmp_path / "link").symlink_to(tmp_path / "memory")
    (tmp_path / "to_database").symlink_to(tmp_path / "memory/memory.sqlite")
    (tmp_path / "memory/outwards").symlink_to(tmp_path / "outside.jsonl")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{target} lies in .*, the folder of a memory. Name a file elsewhere"):
        memory.export_jsonl(tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before and memory.verify() == ((), ())


def test_export_where_no_file_can_be_names_what_was_given(memory, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder. Name a file.$"):
        memory.export_jsonl(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/file/x cannot be written: {tmp_path}/file is a file"):
        memory.export_jsonl(tmp_path / "file/x")
    assert memory.export_jsonl(tmp_path / ("x" * 255)) == 0  # as long as a name can be
    with pytest.raises(OSError) as error:
        memory.export_jsonl(tmp_path / ("x" * 256))
    assert error.value.filename == str(tmp_path / ("x" * 256))
    with pytest.raises(OSError) as error, replaced(tmp_path / "none/x") as temporary:
        temporary.touch()
    assert error.value.filename == str(tmp_path / "none/x")
