"""serving/app.py and its routes: nobody reaches what is another's, and whatever comes in, an error is one line."""

import json
import random
import re
import statistics
import time
from html.parser import HTMLParser

import httpx
import pytest
from fastapi.testclient import TestClient

from benchmarks.serving.fuzz import any_request, mistake_in
from hypernet.serving import scheduler as scheduler_module
from hypernet.serving.app import check_address, create_app
from hypernet.serving.engine import Generation, Sampling
from hypernet.serving.keys import ApiKeys
from hypernet.serving.state import ServerSettings

QUESTION = [{"role": "user", "content": "Who taught Fenda Elfax?"}]


@pytest.fixture(scope="module")
def users(random_model, tmp_path_factory):
    """An application with keys, and a client for each of two users and for nobody."""
    folder = tmp_path_factory.mktemp("serve")
    keys = ApiKeys(folder / "keys.json", create=True)
    headers = {user: {"Authorization": f"Bearer {keys.add(user)}"} for user in ("alice", "bob")}
    settings = ServerSettings(
        directory=str(folder / "data"), keys=str(folder / "keys.json"), max_body_bytes=50_000, max_new_tokens=16
    )
    with TestClient(create_app(random_model, settings), raise_server_exceptions=False) as client:
        app = client.app
        found = {user: TestClient(app, headers=h, raise_server_exceptions=False) for user, h in headers.items()}
        yield found | {"nobody": client}


@pytest.fixture(scope="module")
def alices(users):
    """Ids of what alice has: a memory with a derived one, an adapter."""
    alice = users["alice"]
    memory = alice.post("/v1/memories", json={"content": "Alice keeps her spare key under the blue pot."}).json()
    adapter = alice.post("/v1/adapters", json={"document": "Alice's door code is 4417.", "name": "door.txt"}).json()
    return {"memory": memory["id"], "adapter": adapter["id"], "batch": memory["batch"]}


def error_of(response) -> dict:
    """The error, once it is seen to be in OpenAI's shape, in one line, without a place in the code."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in response.text
    assert "/data/users" not in response.text
    return error


# --- Keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer hn-guessed", "Basic YWxpY2U6", "Bearer", "Bearer \u00e9"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/v1/memories", "/metrics", "/v1/memories/status"])
def test_without_a_key_nothing_is_told(users, path, header):
    headers = {} if header is None else {"Authorization": header.encode("utf-8")}
    response = users["nobody"].get(path, headers=headers)
    assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


def test_health_needs_no_key_and_names_no_user(users, alices):
    response = users["nobody"].get("/healthz")
    assert response.status_code == 200 and response.json()["status"] == "ok"


@pytest.mark.parametrize("where", ["header", "body"])
def test_key_of_one_user_does_not_name_another(users, where):
    if where == "header":
        response = users["bob"].get("/v1/memories", headers={"X-User": "alice"})
    else:
        body = {"model": "tiny:memory", "messages": QUESTION, "user": "alice"}
        response = users["bob"].post("/v1/chat/completions", json=body)
    assert response.status_code == 403 and error_of(response)["code"] == "other_user"


def test_keys_file_has_no_key(tmp_path):
    path = tmp_path / "keys.json"
    first, second = ApiKeys(path, create=True).add("alice"), ApiKeys(path, create=True).add("bob")
    keys = ApiKeys(path)
    assert (keys.user_of(first), keys.user_of(second), keys.user_of(first[:-1])) == ("alice", "bob", None)
    assert first not in path.read_text() and first[3:] not in path.read_text()


def test_keys_file_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is no file of API keys. Make one: hypernet api-key USER."):
        ApiKeys(path)


def test_keys_made_and_revoked_count_without_a_restart(random_model, tmp_path):
    """As `hypernet api-key` in another process changes the file while the server runs."""
    path = tmp_path / "keys.json"
    ApiKeys(path, create=True).add("alice")
    assert path.stat().st_mode & 0o777 == 0o600
    settings = ServerSettings(directory=str(tmp_path / "data"), keys=str(path))
    with TestClient(create_app(random_model, settings), raise_server_exceptions=False) as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        first, second = ApiKeys(path).add("bob"), ApiKeys(path).add("bob")
        assert (status(first), status(second)) == (200, 200)
        assert ApiKeys(path).remove("bob") == 2 and ApiKeys(path).remove("bob") == 0
        assert (status(first), status(second)) == (401, 401)
        third, kept = ApiKeys(path).add("cara"), path.read_bytes()
        for broken in (b"{", None):  # as an editor may leave it; nobody's key counts meanwhile
            path.unlink() if broken is None else path.write_bytes(broken)
            assert status(third) == 401
            path.write_bytes(kept)
            assert status(third) == 200


@pytest.mark.parametrize(("host", "refused"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("::1", False)])
def test_without_keys_only_this_machine_is_served(host, refused):
    if refused:
        with pytest.raises(ValueError, match="can be reached by others"):
            check_address(host, ServerSettings())
    else:
        check_address(host, ServerSettings())


def test_folder_that_cannot_be_one_is_refused_at_the_start(random_model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file\. Name another one\.$"):
        create_app(random_model, ServerSettings(directory=str(tmp_path / "file/below")))


def test_without_keys_another_sites_name_is_refused(random_model, tmp_path):
    with TestClient(
        create_app(random_model, ServerSettings(directory=str(tmp_path))), base_url="http://evil.example"
    ) as c:
        assert c.get("/v1/models").status_code == 400
        assert c.get("/v1/models", headers={"Host": "127.0.0.1:8000"}).status_code == 200


# --- What is another's ----------------------------------------------------------------------------------------------


CALLS = [
    ("GET", "", None),
    ("GET", "/history", None),
    ("PATCH", "", {"content": "It is under the mat."}),
    ("DELETE", "", None),
    ("POST", "/invalidate", {}),
    ("POST", "/restore", None),
    ("POST", "/forget", {"verify": False}),
]


@pytest.mark.parametrize(("method", "verb", "body"), CALLS)
def test_memory_of_another_is_as_unknown_as_none(users, alices, method, verb, body):
    answers = []
    for key in (alices["memory"], f"{alices['memory']}@1", "0123456789abcdef"):
        response = users["bob"].request(method, f"/v1/memories/{key}{verb}", json=body)
        assert response.status_code == 404
        answers.append(error_of(response)["message"].replace(key, "KEY"))
    assert len(set(answers)) == 1
    assert users["alice"].get(f"/v1/memories/{alices['memory']}").json()["text"].endswith("blue pot.")


def test_no_filter_finds_anothers_memory(users, alices):
    bob = users["bob"]
    bob.post("/v1/memories", json={"content": "Bob keeps a cat."})
    for filters in ({}, {"user_id": "alice"}, {"agent_id": "%"}, {"run_id": "' OR 1=1 --"}):
        assert "blue pot" not in bob.get("/v1/memories", params=filters).text
    for question in ("spare key blue pot", 'alice" OR user_id:alice', "* OR 'a'='a", "NEAR(key pot)"):
        found = bob.post("/v1/memories/search", json={"question": question, "limit": 1000})
        assert found.status_code == 200 and "blue pot" not in found.text
    assert users["alice"].post("/v1/memories/search", json={"question": "spare key"}).json()["data"]
    assert bob.post("/v1/memories/search", json={"question": "key", "user_id": "alice"}).status_code == 400
    assert "blue pot" not in bob.get("/v1/memories/export").text
    assert bob.get("/v1/memories/status").json()["memories"] == 1


def test_deleting_without_a_filter_is_refused_and_reaches_own(users, alices):
    bob = users["bob"]
    assert bob.delete("/v1/memories").status_code == 400
    assert bob.delete("/v1/memories", params={"user_id": "alice", "everything": "true"}).status_code == 200
    assert bob.get("/v1/memories").json()["data"] == []
    assert users["alice"].get(f"/v1/memories/{alices['memory']}").status_code == 200


def test_batch_of_another_is_not_rolled_back(users, alices):
    for version in (alices["batch"], "v1", "v999"):
        users["bob"].post("/v1/memories/rollback", json={"version": version})
    users["bob"].post("/v1/memories/purge", json={"key": alices["memory"]})
    assert users["alice"].get(f"/v1/memories/{alices['memory']}").status_code == 200


def test_derived_from_anothers_memory_is_refused(users, alices):
    body = {"content": "A guess.", "derived_from": [f"{alices['memory']}@1"]}
    response = users["bob"].post("/v1/memories", json=body)
    assert response.status_code in (400, 404) and "blue" not in error_of(response)["message"]


def test_imported_rows_become_the_importers(users, alices):
    rows = [json.loads(line) for line in users["alice"].get("/v1/memories/export").text.splitlines()]
    assert users["bob"].post("/v1/memories/import", json={"rows": rows}).status_code == 201
    found = users["bob"].get("/v1/memories").json()["data"]
    assert {row["user_id"] for row in found} == {"bob"}
    assert users["bob"].delete(f"/v1/memories/{alices['memory']}").status_code == 200  # its own copy
    assert users["alice"].get(f"/v1/memories/{alices['memory']}").status_code == 200
    edge = {"uuid": "edge-1", "fact": "Norbach has a harbour.", "group_id": "alice"}
    assert users["bob"].post("/v1/memories/import", json={"format": "graphiti", "rows": [edge]}).status_code == 201
    assert users["bob"].get("/v1/memories/edge-1").json()["user_id"] == "bob"


def test_imported_row_with_another_texts_hash_is_refused(users):
    rows = [{"text": "Bob keeps a dog."}, {"text": "Bob keeps a fox.", "sha256": "0" * 64}]
    response = users["bob"].post("/v1/memories/import", json={"rows": rows})
    assert response.status_code == 400
    assert error_of(response)["message"].startswith("rows, line 2 is no memory of the format plain: its sha256 is")
    assert "dog" not in users["bob"].get("/v1/memories").text


@pytest.mark.parametrize("name", ["ID", "PREFIX", "door.txt", "../../x", "..%2f..%2fusers", "/etc/passwd", "\x00"])
def test_adapter_of_another_is_as_unknown_as_none(users, alices, name):
    name = {"ID": alices["adapter"], "PREFIX": alices["adapter"][:6]}.get(name, name)
    bob = users["bob"]
    response = bob.post("/v1/chat/completions", json={"model": f"tiny:{name}", "messages": QUESTION})
    assert response.status_code == 404 and "4417" not in response.text
    assert error_of(response)["message"].startswith("You have no adapter")
    if name.isalnum():
        assert bob.get(f"/v1/adapters/{name}").status_code == bob.delete(f"/v1/adapters/{name}").status_code == 404
    assert alices["adapter"] not in bob.get("/v1/adapters").text + bob.get("/v1/models").text


def test_adapter_is_listed_used_and_deleted(users):
    alice = users["alice"]
    made = alice.post("/v1/adapters", json={"document": "Norbach was founded by Ilda Renwick.", "name": "norbach.txt"})
    assert made.status_code == 201
    key = made.json()["id"]
    assert made.json()["model"] in [row["id"] for row in alice.get("/v1/models").json()["data"]]
    again = alice.post("/v1/adapters", json={"document": "Norbach was founded by Ilda Renwick.", "name": "norbach.txt"})
    assert again.json()["id"] == key
    for name in (key, key[:8], "norbach.txt"):
        body = {"model": f"tiny:{name}", "messages": QUESTION, "max_tokens": 3}
        assert alice.post("/v1/chat/completions", json=body).status_code == 200
    assert alice.delete(f"/v1/adapters/{key}").json()["deleted"]
    assert alice.get(f"/v1/adapters/{key}").status_code == 404
    assert alice.post("/v1/chat/completions", json=body).status_code == 404


def test_unknown_id_takes_as_long_as_anothers(users, alices):
    """Medians of 40 calls in turns: what is another's lies in another file, which the call does not open."""
    seconds = {alices["memory"]: [], "0123456789abcdef": []}
    for _ in range(40):
        for key, found in seconds.items():
            started = time.perf_counter()
            users["bob"].get(f"/v1/memories/{key}")
            found.append(time.perf_counter() - started)
    one, other = map(statistics.median, seconds.values())
    assert 0.5 < one / other < 2


def test_metrics_name_routes_and_no_user(users, alices):
    users["alice"].get(f"/v1/memories/{alices['memory']}")
    text = users["alice"].get("/metrics").text
    assert 'hypernet_requests_total{route="/v1/memories/{key}",status="200"}' in text
    assert alices["memory"] not in text and "alice" not in text


# --- Verbs ----------------------------------------------------------------------------------------------------------


def test_every_verb_of_a_memory_over_http(random_model, tmp_path):
    with TestClient(
        create_app(random_model, ServerSettings(directory=str(tmp_path))), base_url="http://127.0.0.1"
    ) as client:

        def ok(method: str, path: str = "", body=None, **params):
            response = client.request(method, f"/v1/memories{path}", json=body, params=params)
            assert response.status_code in (200, 201), response.text
            return response.json()

        key = {"subject": "Alice", "relation": "home"}
        ref = ok("POST", body={"content": "Alice lives in Rome.", **key, "valid_at": "2026-01-01"})
        ok("PATCH", f"/{ref['id']}", {"content": "Alice lives in Oslo.", "valid_at": "2026-06-01"})
        assert ok("GET", f"/{ref['id']}", as_of="2026-02-01")["text"].endswith("Rome.")
        assert [row["text"] for row in ok("GET", as_of="2026-07-01")["data"]] == ["Alice lives in Oslo."]
        assert len(ok("GET", f"/{ref['id']}/history")["data"]) == 2
        chat = ok("POST", body={"content": [{"role": "user", "content": "I play chess."}], "run_id": "r1"})
        assert "Oslo" in ok("GET", "/profile")["text"]
        assert ok("POST", "/write_adapters")["written"] == 3
        answer = ok("POST", "/ask", {"question": "Where does Alice live?", "tier": "adapter", "max_tokens": 4})
        assert answer["tier"] == "adapter" and answer["prompt_tokens"] == 0
        assert len(ok("POST", "/explain", answer)["data"]) == len(answer["memories"])
        assert ok("POST", "/ask", {"question": "Where does Alice live?", "tier": "token"})["prompt_tokens"] > 0
        assert {row["tier"] for row in ok("POST", "/measure")["data"]} == {"none", "token", "adapter"}
        assert ok("DELETE", run_id="r1")["memories"] == [chat[0]["ref"]]
        ok("POST", f"/{chat[0]['id']}/restore")
        ended = ok("POST", f"/{chat[0]['id']}/invalidate", {})
        assert ok("POST", "/rollback", {"version": ended["batch"]})["memories"]
        assert ok("POST", f"/{ref['id']}/forget", {"verify": False})
        ok("POST", "/purge", {})
        assert len(ok("GET", "/versions")["data"]) > 5
        assert ok("GET", "/status")["tiers"]["token"] and ok("POST", "/verify")["damage"] == []


VERBS = ["adapters", "write_adapters", "explain", "measure", "forget"]


@pytest.mark.parametrize("verb", VERBS)
def test_running_answers_go_on_while_slow_work_runs(random_model, tmp_path, monkeypatch, verb):
    """An endless answer gets tokens between the pieces of a document, of memories, and of the verbs that ask much."""
    app = create_app(random_model, ServerSettings(directory=str(tmp_path)))
    with TestClient(app, base_url="http://127.0.0.1") as bob:
        check_answers_go_on(bob, monkeypatch, verb)


def check_answers_go_on(bob, monkeypatch, verb):
    scheduler = bob.app.state.server.scheduler
    keys = [
        bob.post("/v1/memories", json={"content": f"Town {n} has {n} gates.", "subject": f"Town {n}", "relation": verb})
        for n in range(20 if verb == "write_adapters" else 3)
    ]
    if verb in ("measure", "forget", "explain"):
        bob.post("/v1/memories/write_adapters")
    answer = bob.post(
        "/v1/memories/ask", json={"question": "How many gates has Town 3?", "tier": "token", "max_tokens": 8}
    ).json()
    assert verb != "explain" or len(answer["memories"]) == 3
    with bob.app.state.server.stores.memory("local") as memory:
        memory.asker.max_new_tokens = 4  # of each question that measure and forget ask
    monkeypatch.setattr(scheduler.engine, "ends", [])
    deltas = []
    endless = Generation(prompt=[5, 6], sampling=Sampling(max_new_tokens=480), emit=deltas.append)
    scheduler.submit(endless)
    while not endless.ids:
        time.sleep(0.001)
    counted = []
    finish = scheduler_module._finish

    def counting(work, future):
        def counted_work():
            before = len(endless.ids)
            try:
                return work()
            finally:
                counted.append(len(endless.ids) - before)

        finish(counted_work, future)

    monkeypatch.setattr(scheduler_module, "_finish", counting)
    calls = {
        "adapters": ("/v1/adapters", {"document": "Norbach was founded by Ilda Renwick. " * 60, "name": "norbach"}),
        "write_adapters": ("/v1/memories/write_adapters", None),
        "explain": ("/v1/memories/explain", answer),
        "measure": ("/v1/memories/measure", None),
        "forget": (f"/v1/memories/{keys[0].json()['id']}/forget", {"verify": True}),
    }
    response = bob.post(calls[verb][0], json=calls[verb][1])
    assert response.status_code in (200, 201), response.text
    assert verb != "forget" or response.json()["passed"]
    assert max(counted) >= {"measure": 12, "forget": 12, "explain": 1}.get(verb, 2)  # once between two pieces
    endless.cancelled = True


# --- The page -------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags with their attributes, ids that labels name, and text of table cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells and self.tags[-1][0] in ("td", "th"):
            self.cells[-1] += data


def test_page_shows_four_answers_with_their_cost(random_model, tmp_path):
    document, question = (
        "Fenda Elfax was taught by Orla Wint. <b>She</b> was born in Gronmaburg.",
        "Who taught <i>her</i>?",
    )
    with TestClient(
        create_app(random_model, ServerSettings(directory=str(tmp_path))), base_url="http://127.0.0.1"
    ) as client:
        response = client.post("/", data={"document": document, "question": question})
        memories = client.get("/v1/memories").json()["data"]
        (adapter,) = client.get("/v1/adapters").json()["data"]
        body = {"model": adapter["model"], "messages": [{"role": "user", "content": question}], "max_tokens": 64}
        answered = client.post("/v1/chat/completions", json=body).json()
    assert response.status_code == 200 and len(memories) == 2
    seen = Seen(response.text)
    rows = [seen.cells[i : i + 5] for i in range(5, 25, 5)]
    names = ["No context", "Adapter", "Memory text in the prompt", "Whole document in the prompt"]
    assert [row[0] for row in rows] == names
    tokens = [int(row[2]) for row in rows]
    assert tokens[0] == tokens[1] == answered["usage"]["prompt_tokens"] < tokens[2] <= tokens[3]
    assert rows[1][1] == answered["choices"][0]["message"]["content"]
    assert rows[1][4] == f"{adapter['bytes']:,}" and rows[0][4] == "0"
    assert "<b>She" not in response.text and "<i>her" not in response.text


def test_page_needs_no_other_host_and_names_every_field(users):
    response = users["nobody"].get("/")
    seen = Seen(response.text)
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not [tag for tag, _ in seen.tags if tag in ("link", "img", "iframe")]
    assert [found for tag, found in seen.tags if tag == "script"] == [{"src": "/page.js", "defer": None}]
    script = users["nobody"].get("/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|eval\(|Function\(", script.text)
    assert "http" not in response.text.replace("http-equiv", "")
    fields = {found["id"] for tag, found in seen.tags if tag in ("input", "textarea", "select")} - {"name"}  # hidden
    assert fields == {found["for"] for tag, found in seen.tags if tag == "label"} >= {"document", "question", "key"}
    assert ("html", {"lang": "en"}) in seen.tags


def test_page_refuses_a_wrong_key_and_another_sites_form(users):
    form = {"document": "Alice's door code is 4417.", "question": "What is it?", "key": "hn-guessed"}
    refused = users["nobody"].post("/", data=form)
    assert refused.status_code == 401 and 'role="alert"' in refused.text
    foreign = users["nobody"].post("/", data=form, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403 and "not this server" in foreign.text
    assert users["nobody"].post("/", content=b"\xff=&" * 9).status_code == 400


def test_file_becomes_text_by_its_name(users):
    page = "<html><head><title>T</title></head><body><p>Fenda was <b>born</b> in Oslo.</p></body></html>"
    for name, content, text in [("a.html", page.encode(), "Fenda was born in Oslo.\n"), ("a.md", b"# One", "# One")]:
        found = users["alice"].post("/text", params={"name": f"../{name}"}, content=content)
        assert found.json() == {"name": name, "text": text}
    refused = users["alice"].post("/text", params={"name": "a.pdf"}, content=b"%PDF-1.4 broken")
    assert refused.status_code == 400 and "a.pdf" in error_of(refused)["message"]
    assert users["nobody"].post("/text", params={"name": "a.md"}, content=b"x").status_code == 401
    foreign = users["alice"].post("/text?name=a.md", content=b"x", headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403


def test_answers_are_streamed_behind_the_progress(users):
    """What page.js reads: the chunks that are read, then the table or what is wrong."""
    key = users["alice"].headers["Authorization"].removeprefix("Bearer ")
    form = {"document": "Norbach was founded by Ilda Renwick. " * 60, "question": "Who?", "key": key}
    for fields, says in [(form, "Four answers"), (form | {"key": "hn-guessed"}, "Give your API key")]:
        lines = users["nobody"].post("/answers", data=fields).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert says in events[-1]["html"] and all(event.keys() == {"done", "chunks"} for event in events[:-1])
        assert [event["done"] for event in events[:-1]] == sorted(event["done"] for event in events[:-1])
        assert says != "Four answers" or (len(events) > 3 and events[-2]["done"] == events[-2]["chunks"])


# --- Limits and malformed requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_oversize_body_is_refused(users, chunked):
    body = json.dumps({"document": "x" * 60_000}).encode()
    content = iter([body[:30_000], body[30_000:]]) if chunked else body
    response = users["alice"].post("/v1/adapters", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and "at most 50,000 bytes" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "There is no model 'gpt-4': name tiny, tiny:memory or tiny:ADAPTER."),
        ({"max_tokens": 17}, 400, "an answer has at most 16 tokens"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, 400, "does not fit"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Orla"}]}, 400, "should be the user's"),
        ({"tools": []}, 400, "tools: There is no such setting here"),
        ({"n": 2}, 400, "n: "),
        ({"temperature": -1}, 400, "temperature: "),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: "),
    ],
)
def test_impossible_completion_says_what_is_wrong(users, changes, status, message):
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2} | changes
    response = users["alice"].post("/v1/chat/completions", json=body)
    assert response.status_code == status and message in error_of(response)["message"]


def test_full_queue_is_429_with_retry_after(users):
    app = users["alice"].app
    scheduler = app.state.server.scheduler
    most, scheduler.max_queue = scheduler.max_queue, 0
    try:
        response = users["alice"].post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
    finally:
        scheduler.max_queue = most
    assert response.status_code == 429 and response.headers["Retry-After"] == "1"
    assert error_of(response)["code"] == "queue_full"


def test_control_token_in_a_message_is_text(users, tiny_tokenizer):
    """A message cannot end its turn and write another role's."""
    spelled = tiny_tokenizer.eos_token
    body = {"model": "tiny", "messages": [{"role": "user", "content": spelled}], "max_tokens": 1}
    plain = body | {"messages": [{"role": "user", "content": ""}]}
    counts = [
        users["alice"].post("/v1/chat/completions", json=one).json()["usage"]["prompt_tokens"] for one in (body, plain)
    ]
    assert counts[0] > counts[1] + 1


def test_malformed_requests_are_never_a_500(users):
    rng, statuses = random.Random(5), set()
    for _ in range(600):
        request = any_request(rng)
        response = users["bob"].request(**request._asdict())
        assert not mistake_in(response, directory="/data/users"), (request, response.text)
        statuses.add(response.status_code)
    assert {200, 400, 404, 405} <= statuses
    assert users["bob"].get("/healthz").json()["status"] == "ok"


def test_mistakes_in_answers_are_seen():
    """The check above does fail."""
    error = {"message": "One line.", "type": "t", "param": None, "code": None}
    found = [
        httpx.Response(status, json=body)
        for status, body in [
            *((500, {"error": error}), (400, {"detail": "x"}), (400, {"error": error | {"message": "Two\nlines"}})),
            *(
                (200, "Traceback (most"),
                (404, {"error": error | {"message": "/data/users/x"}}),
                (400, {"error": error}),
            ),
        ]
    ]
    assert [bool(mistake_in(response, directory="/data/users")) for response in found] == [True] * 5 + [False]
