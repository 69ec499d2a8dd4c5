"""serving/mcp_server.py: the official SDK's client calls a memory's verbs, in one process, over stdio and over HTTP."""

import asyncio
import json
import sys

import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from typer.testing import CliRunner

from benchmarks.serving.process import ROOT, ServerProcess
from hypernet.cli.main import app
from hypernet.memory.memory import Memory
from hypernet.serving.mcp_server import memory_server

VERBS = "add search ask get list history profile status write_adapters".split()
VERBS += "update invalidate delete delete_all restore forget".split()


async def call(client: Client, name: str, **arguments):
    """What a tool gave; a text if it refused."""
    result = await client.call_tool(f"memory_{name}", arguments)
    if result.is_error:
        return result.content[0].text
    return result.structured_content or json.loads(result.content[0].text)


async def remember_and_forget(client: Client) -> None:
    """The story that each transport is told."""
    assert {tool.name for tool in (await client.list_tools()).tools} == {f"memory_{verb}" for verb in VERBS}
    key = {"subject": "Alice", "relation": "home"}
    ref = await call(client, "add", content="Alice lives in Rome.", valid_at="2026-01-01", **key)
    await call(client, "update", id=ref["id"], content="Alice lives in Oslo.", valid_at="2026-06-01")
    found = await call(client, "search", question="Where does Alice live?", as_of="2026-02-01")
    assert [hit["text"] for hit in found["memories"]] == ["Alice lives in Rome."]
    assert (await call(client, "get", id=ref["id"], as_of="2026-07-01"))["text"] == "Alice lives in Oslo."
    assert len((await call(client, "history", id=ref["id"]))["history"]) == 2
    await call(client, "delete", id=ref["id"])
    assert "There is no memory" in await call(client, "get", id=ref["id"])
    await call(client, "restore", id=ref["id"])
    assert (await call(client, "status"))["versions"] == 2
    forgotten = await call(client, "forget", id=ref["id"])
    assert len(forgotten["erased"]["memories"]) == 2
    assert (await call(client, "list"))["memories"] == []


WRONG = [
    ("search", {}, "question: Field required."),
    ("search", {"question": "Who?", "limit": "many"}, "limit: Input should be a valid integer"),
    ("ask", {"question": "Who?", "tier": "lost"}, "tier: Input should be 'auto', 'token', 'adapter' or 'none'."),
]


@pytest.mark.parametrize(("name", "arguments", "says"), WRONG)
def test_wrong_arguments_are_told_to_agents_in_one_line(memory, name, arguments, says):
    async def told():
        async with Client(memory_server(memory, user="alice")) as client:
            return await call(client, name, **arguments)

    message = asyncio.run(told())
    assert says in message and "\n" not in message and "pydantic" not in message


@pytest.fixture
def memory(tmp_path):
    found = Memory.open(tmp_path / "memory")
    yield found
    found.close()


def test_agent_remembers_and_forgets_in_one_process(memory):
    async def story():
        async with Client(memory_server(memory, user="alice")) as client:
            await remember_and_forget(client)

    asyncio.run(story())


def test_agent_remembers_and_forgets_over_stdio(tmp_path):
    arguments = ["-m", "hypernet", "mcp", "--directory", str(tmp_path / "memory"), "--user", "alice"]

    async def story():
        parameters = StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT)
        async with Client(stdio_client(parameters)) as client:
            await remember_and_forget(client)

    asyncio.run(story())


def test_agent_remembers_and_forgets_over_http(tmp_path):
    command = ["-m", "hypernet", "mcp", "--directory", str(tmp_path / "memory")]
    command += ["--user", "alice", "--transport", "http"]

    async def story(url: str):
        async with Client(url) as client:
            await remember_and_forget(client)

    with ServerProcess(command, probe="/") as server:
        asyncio.run(story(f"{server.url}/mcp"))


def test_agent_sees_nothing_of_another_user(memory):
    secret = memory.add("Bob's code is 4417.", user_id="bob", run_id="r1")
    memory.add("Alice plays chess.", user_id="alice", run_id="r1")

    async def tries():
        async with Client(memory_server(memory, user="alice")) as client:
            unknown = await call(client, "get", id="0123456789abcdef")
            for verb in ("get", "history", "invalidate", "delete", "restore", "forget"):
                refused = await call(client, verb, id=secret.id)
                assert refused.replace(secret.id, "0123456789abcdef") == unknown.replace("_get", f"_{verb}")
            assert "There is no memory" in await call(client, "update", id=secret.id, content="It is 1.")
            for text in (await call(client, "search", question="code 4417"), await call(client, "list")):
                assert "4417" not in json.dumps(text)
            deleted = await call(client, "delete_all", run_id="r1")
            assert len(deleted["memories"]) == 1

    asyncio.run(tries())
    assert memory.get(secret.id).text == "Bob's code is 4417."


def test_agent_is_told_in_one_line_what_is_wrong(memory):
    async def tries():
        async with Client(memory_server(memory, user="alice")) as client:
            for verb, arguments in {
                "add": {"content": "x", "valid_at": "soon"},
                "ask": {"question": "Who?"},
                "search": {"question": "Who?", "limit": 0},
                "get": {"id": "../../x y"},
            }.items():
                refused = await call(client, verb, **arguments)
                assert isinstance(refused, str) and "\n" not in refused and "Traceback" not in refused
                assert len(refused) > 30 + len("Error executing tool")

    asyncio.run(tries())


def test_model_answers_an_agent_from_each_tier(random_model, tmp_path):
    memory = Memory.open(tmp_path / "memory", model=random_model)

    async def tries():
        async with Client(memory_server(memory, user="alice")) as client:
            await call(client, "add", content="Fenda Elfax was taught by Orla Wint.")
            assert (await call(client, "write_adapters"))["written"] == 1
            for tier in ("token", "adapter", "none"):
                answer = await call(client, "ask", question="Who taught Fenda Elfax?", tier=tier)
                assert answer["tier"] == tier and len(answer["memories"]) == (tier != "none")

    asyncio.run(tries())
    memory.close()


def test_http_is_for_this_machine_alone(tmp_path):
    arguments = ["mcp", "--directory", str(tmp_path / "m"), "--transport", "http", "--host", "0.0.0.0"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError) and "can be reached by others" in str(result.exception)
    assert not (tmp_path / "m").exists()
