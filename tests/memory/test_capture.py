"""Conversations: stored as they go, one batch, taken back at once."""

import pytest

from hypernet.memory.memory import Memory


@pytest.fixture
def memory(tmp_path):
    memory = Memory.open(tmp_path / "memory")
    yield memory
    memory.close()


def test_conversation_is_one_batch_that_can_be_taken_back(memory, tmp_path):
    memory.add("before", user_id="alice")
    memory.export_jsonl(tmp_path / "before.jsonl")
    with memory.capture(user_id="alice", run_id="chat-8") as turn:
        turn.user("I moved to Halvawold")
        memory.add("another call in between", user_id="bob")
        turn.assistant("Noted.")
    said = memory.list(run_id="chat-8")
    assert [(m.role, m.text) for m in said] == [("user", "I moved to Halvawold"), ("assistant", "Noted.")]
    assert [ref.batch for ref in turn.refs] == [turn.version] * 2
    memory.delete_all(user_id="bob")
    memory.rollback(turn.version)
    memory.export_jsonl(tmp_path / "after.jsonl")
    assert (tmp_path / "before.jsonl").read_bytes() == (tmp_path / "after.jsonl").read_bytes()


def test_conversation_that_fails_keeps_what_was_said(memory):
    with pytest.raises(RuntimeError), memory.capture(user_id="alice") as turn:
        turn.user("Remember this")
        raise RuntimeError
    assert [m.text for m in memory.list(user_id="alice")] == ["Remember this"]


def test_silent_conversation_is_no_batch(memory):
    with memory.capture(user_id="alice") as turn:
        pass
    assert turn.version is None and memory.versions() == ()


def test_conversation_that_was_taken_back_is_closed(memory):
    with memory.capture(user_id="alice") as turn:
        turn.user("one")
        memory.rollback(turn.version)
        with pytest.raises(ValueError, match="was taken back"):
            turn.user("two")
    assert memory.list() == ()


def test_chat_messages_of_all_kinds_are_added(memory):
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "here"}]
    refs = memory.add([{"role": "user", "content": parts}, {"role": "assistant", "content": "I see"}], user_id="alice")
    assert [m.text for m in memory.list()] == ["look\nhere", "I see"] and refs[0].batch == refs[1].batch


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": "good"}, {"role": "assistant", "content": None}],
            r"Message 2 \(role 'assistant'\)",
        ),
        ([{"content": "no role"}], "Message 1 is .* Give role and content"),
        (["text"], "Message 1 is 'text'"),
    ],
)
def test_message_without_text_is_one_line_and_adds_none(memory, messages, message):
    with pytest.raises(ValueError, match=message):
        memory.add(messages, user_id="alice")
    with pytest.raises(ValueError, match="no single subject"):
        memory.add([{"role": "user", "content": "x"}], subject="a", relation="b")
    assert memory.list() == ()
