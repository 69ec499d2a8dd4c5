"""The hub is asked once: a server of this test, or none, stands for it."""

from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from hypernet.base.base_model import load_base_model
from hypernet.io.hub import hub_asked_once


@pytest.fixture
def hub(monkeypatch):
    """What was asked of a server that has nothing; the settings of tests, which forbid asking, do not hold."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD
        log_message = staticmethod(lambda *_: None)

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("raised", [None, KeyError])
def test_hub_out_of_reach_is_left_alone_inside_the_block(hub, monkeypatch, raised):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(raised) if raised else nullcontext(), hub_asked_once("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE
        if raised:
            raise raised
    assert not constants.HF_HUB_OFFLINE and hub == []


def test_hub_that_answers_is_used(hub):
    with hub_asked_once("nobody/nothing"):
        assert not constants.HF_HUB_OFFLINE
    assert hub == ["/"]


def test_nothing_is_asked_for_a_folder_or_offline(hub, monkeypatch, tmp_path):
    with hub_asked_once(tmp_path):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_asked_once("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE
    assert hub == []


def test_base_model_of_a_hub_out_of_reach_is_one_line(hub, monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="Could not load the base model from nobody/nothing: .*network") as error:
        load_base_model("nobody/nothing")
    assert "\n" not in str(error.value) and caplog.messages == []
