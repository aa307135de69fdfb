"""A server that is scripted and only fails: what is tried again, what is missing, what is never sent."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from asking import decode, run, selected

from crate_mini import UserError
from crate_mini.judges import http_client as clients
from crate_mini.judges import run as llm

KEY = "sk-secret-0123456789"


@contextmanager
def server(*script):
    """(base URL, requests seen): answers by the script, its last entry for good: (status, headers, body), a
    function of the request's JSON that gives one, or None to cut the connection."""
    seen, left = [], list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((time.monotonic(), self.path, dict(self.headers), body))
            entry = left.pop(0) if len(left) > 1 else left[0]
            entry = entry(body) if callable(entry) else entry
            if entry is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, said = entry
            said = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(said), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


QUERY = {"ask": "text", "prompt": "say", "most": 3}
FINE = (
    200,
    {},
    {"choices": [{"text": "yes"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
)


def client(url, slept=None, **more):
    return clients.Http(
        "m", url, "CRATE_TEST_KEY", sleep=(slept if slept is not None else []).append, **more
    )


def test_429_waits_as_long_as_it_is_told():
    later = formatdate(time.time() + 30, usegmt=True)
    script = (429, {"Retry-After": "7"}, {}), (429, {"Retry-After": later}, {}), (429, {}, {}), FINE
    with server(*script) as (url, seen):
        slept = []
        assert client(url, slept).ask(QUERY) == {"text": "yes", "tokens": [1, 1]}
    assert len(seen) == 4 and slept[0] == 7 and 27 < slept[1] <= 30 and slept[2] == 4


def test_the_wait_is_real():
    with server((429, {"Retry-After": "0.4"}, {}), FINE) as (url, seen):
        clients.Http("m", url, "CRATE_TEST_KEY").ask(QUERY)
    assert seen[1][0] - seen[0][0] >= 0.4


def test_a_wait_of_an_hour_ends_the_run():
    with (
        server((429, {"Retry-After": "3600"}, {})) as (url, seen),
        pytest.raises(UserError, match="3600 s"),
    ):
        client(url).ask(QUERY)
    assert len(seen) == 1


def test_500_is_tried_again_then_the_answer_is_missing():
    slept = []
    with (
        server((500, {}, b"oops")) as (url, seen),
        pytest.raises(clients.Failed, match="500: oops"),
    ):
        client(url, slept).ask(QUERY)
    assert len(seen) == 5 and slept == [1, 2, 4, 8]
    with server((503, {}, b""), FINE) as (url, _):
        assert client(url).ask(QUERY)["text"] == "yes"
    cut = 500, {"Transfer-Encoding": "chunked"}, b"ff\r\noops"
    with server(cut, FINE) as (url, _):
        assert client(url).ask(QUERY)["text"] == "yes"
    with server(cut) as (url, _), pytest.raises(clients.Failed, match="status 500"):
        client(url, tries=2).ask(QUERY)


def test_a_cut_connection_is_tried_again_then_told():
    with server(None, FINE) as (url, seen):
        assert client(url).ask(QUERY)["text"] == "yes"
    with server(None) as (url, seen), pytest.raises(UserError, match="does not answer"):
        client(url, tries=3).ask(QUERY)
    assert len(seen) == 3
    half = 200, {"Content-Length": 400}, b'{"choices"'
    with server(half) as (url, seen), pytest.raises(UserError, match="does not answer"):
        client(url, tries=2, timeout=0.3).ask(QUERY)


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/v1 does not answer .*--url"):
        client(f"http://127.0.0.1:{port}/v1", tries=2).ask(QUERY)


@pytest.mark.parametrize(
    "said",
    [
        b"<html>",
        [],
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [None]},
        {"choices": [{"text": None}]},
        {"choices": [{"text": " \n"}]},
    ],
)
def test_nonsense_is_missing(said):
    with (
        server((200, {}, said)) as (url, seen),
        pytest.raises(clients.Failed, match="not OpenAI's"),
    ):
        client(url).ask(QUERY)
    assert len(seen) == 1  # asking again would say the same


@pytest.mark.parametrize(
    "said",
    [
        {"logprobs": None},
        {"logprobs": {"tokens": [], "top_logprobs": []}},
        {"logprobs": {"tokens": ["a", "\t", "?", "x"], "top_logprobs": [{}] * 4}},
    ],
)
def test_prompt_logprobs_that_are_accepted_and_ignored(said):
    with (
        server((200, {}, {"choices": [{"text": "", **said}]})) as (url, _),
        pytest.raises(clients.Failed),
    ):
        client(url).ask({"ask": "slots", "prompt": "a\t?", "at": [2]})


def test_a_server_that_can_do_nothing_lacks_every_rung(tmp_path):
    with server((404, {}, {"error": "no such path"})) as (url, seen):
        for style in ("text", "chat"):
            with pytest.raises(
                UserError, match="rung A: no prompt logprobs .*404.*rung D: no " + style
            ):
                run(
                    tmp_path,
                    simulator="http:m",
                    explainer="template",
                    rung="auto",
                    style=style,
                    url=url,
                    despite_probe=True,
                )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", ["nonsense", '[[" a", 1]]', "[]", '{" a": 1}'])
def test_a_server_that_answers_but_wrongly_is_refused(tmp_path, pairs):
    """Wrong token counts: every simulation of the probe is missing, none is taken for zeros."""
    reply = 200, {}, {"choices": [{"message": {"content": pairs}}]}
    with (
        server(reply) as (url, _),
        pytest.raises(UserError, match="wins 0 of 3 puzzles, 27 of 27 sim"),
    ):
        run(
            tmp_path,
            simulator="http:m",
            explainer="template",
            rung="C",
            style="chat",
            url=url,
            despite_probe=True,
        )


def test_the_key_is_in_no_file_and_no_message(tmp_path, monkeypatch, caplog, capsys):
    """Sent to the server and nowhere else, though the server sends it back."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CRATE_TEST_KEY", KEY)
    told = []
    for status in (400, 401, 500):
        with server((status, {}, {"error": f"bad key {KEY}"})) as (url, seen):
            for more in (
                {"rung": "auto"},
                {"rung": "C", "style": "chat", "record": str(tmp_path / "tape")},
            ):
                with pytest.raises(UserError) as error:
                    s = llm.Settings(simulator="http:m", key_env="CRATE_TEST_KEY", url=url, **more)
                    monkeypatch.setattr(clients.Http, "_post", short(clients.Http._post))
                    llm.run(selected(), decode, s, tmp_path, told.append)
                told.append(str(error.value))
                monkeypatch.undo()
                monkeypatch.setenv("CRATE_TEST_KEY", KEY)
        assert seen[0][2]["Authorization"] == f"Bearer {KEY}"
    outputs = [caplog.text, *capsys.readouterr(), *told, repr(s)]
    outputs += [path.read_text() for path in tmp_path.iterdir()]
    assert len(told) >= 6 and not any(KEY in output for output in outputs)
    assert any("***" in output for output in outputs)


def short(post):
    def once(self, *args):
        self.tries = 1
        return post(self, *args)

    return once


def test_the_key_travels_to_one_host_only(monkeypatch):
    monkeypatch.setenv("CRATE_TEST_KEY", KEY)
    with server(FINE) as (other, stolen):
        moved = 302, {"Location": f"{other}/completions"}, {}
        with server(moved) as (url, _), pytest.raises(UserError, match="302"):
            client(url).ask(QUERY)
    assert not stolen
    with pytest.raises(UserError, match="unencrypted"):
        client("http://models.example.org/v1")
    client("https://models.example.org/v1")
    monkeypatch.delenv("CRATE_TEST_KEY")
    with pytest.raises(UserError, match="models.example.org needs a key: .*CRATE_TEST_KEY"):
        client("https://models.example.org/v1")
    for url in (
        "file:///etc/hosts",
        "127.0.0.1:8080/v1",
        "ftp://127.0.0.1/v1",
        "http://me@127.0.0.1/v1",
        "",
    ):
        with pytest.raises(UserError, match="no base URL"):
            client(url)
