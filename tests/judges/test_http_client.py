"""A scripted server that fails: what is tried again, what counts as missing, where the key goes."""

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from planted_excerpts import decode, run, selected

from crate_mini import UserError
from crate_mini.judges import pipeline
from crate_mini.judges.command import Settings
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.queries import NoAnswer

KEY = "sk-secret-0123456789"
KEY_ENV = "CRATE_TEST_KEY"
QUERY = {"ask": "text", "prompt": "say", "most": 3}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
FINE = (200, {}, {"choices": [{"text": "yes"}], "usage": USAGE})


@contextmanager
def server(*script):
    """(base URL, requests seen) of a server that answers by a script.

    An entry is (status, headers, body), or None to cut the connection; the last one is repeated. A
    request is (time, path, headers, JSON body).
    """
    seen, remaining = [], list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((time.monotonic(), self.path, dict(self.headers), body))
            entry = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if entry is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, content = entry
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

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


def client(url, waits=None, **options):
    """A client that does not wait but appends to `waits` how long it would."""
    waits = [] if waits is None else waits
    return HttpClient("m", url, KEY_ENV, sleep=waits.append, **options)


def judge(folder, url, **changes):
    """A run over the planted neurons with the model `m` of a server as simulator."""
    changes = {"explainer": "template", "despite_probe": True, **changes}
    return run(folder, simulator="http:m", url=url, **changes)


# ---- tried again ---------------------------------------------------------------------------------


def test_429_waits_as_long_as_the_server_asks():
    later = formatdate(time.time() + 30, usegmt=True)
    busy = [(429, {"Retry-After": "7"}, {}), (429, {"Retry-After": later}, {}), (429, {}, {})]
    waits = []
    with server(*busy, FINE) as (url, seen):
        assert client(url, waits).ask(QUERY) == {"text": "yes", "tokens": [1, 1]}
    assert len(seen) == 4
    assert waits[0] == 7
    assert 27 < waits[1] <= 30
    assert waits[2] == 4


def test_the_wait_is_real():
    with server((429, {"Retry-After": "0.1"}, {}), FINE) as (url, seen):
        HttpClient("m", url, KEY_ENV).ask(QUERY)
    assert seen[1][0] - seen[0][0] >= 0.1


def test_a_wait_of_an_hour_ends_the_run():
    later = 429, {"Retry-After": "3600"}, {}
    with server(later) as (url, seen), pytest.raises(UserError, match="3600 s"):
        client(url).ask(QUERY)
    assert len(seen) == 1


def test_500_is_tried_again_until_the_answer_counts_as_missing():
    waits = []
    with server((500, {}, b"oops")) as (url, seen), pytest.raises(NoAnswer, match="500: oops"):
        client(url, waits).ask(QUERY)
    assert len(seen) == 5
    assert waits == [1, 2, 4, 8]
    with server((503, {}, b""), FINE) as (url, _):
        assert client(url).ask(QUERY)["text"] == "yes"


def test_an_error_message_may_be_cut():
    cut = 500, {"Transfer-Encoding": "chunked"}, b"ff\r\noops"
    with server(cut, FINE) as (url, _):
        assert client(url).ask(QUERY)["text"] == "yes"
    with server(cut) as (url, _), pytest.raises(NoAnswer, match="status 500"):
        client(url, tries=2).ask(QUERY)


def test_a_cut_connection_is_tried_again_until_it_ends_the_run():
    with server(None, FINE) as (url, seen):
        assert client(url).ask(QUERY)["text"] == "yes"
    with server(None) as (url, seen), pytest.raises(UserError, match="does not answer"):
        client(url, tries=3).ask(QUERY)
    assert len(seen) == 3
    half = 200, {"Content-Length": 400}, b'{"choices"'
    with server(half) as (url, _), pytest.raises(UserError, match="does not answer"):
        client(url, tries=2, timeout=0.3).ask(QUERY)


def test_a_server_that_is_not_running_ends_the_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/v1 does not answer .*--url"):
        client(f"http://127.0.0.1:{port}/v1", tries=2).ask(QUERY)


# ---- missing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
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
def test_nonsense_counts_as_missing(body):
    with server((200, {}, body)) as (url, seen), pytest.raises(NoAnswer, match="not OpenAI's"):
        client(url).ask(QUERY)
    assert len(seen) == 1  # the next answer would be the same


@pytest.mark.parametrize(
    "choice",
    [
        {"logprobs": None},
        {"logprobs": {"tokens": [], "top_logprobs": []}},
        {"logprobs": {"tokens": ["a", "\t", "?", "x"], "top_logprobs": [{}] * 4}},
    ],
)
def test_prompt_logprobs_that_a_server_ignores_count_as_missing(choice):
    reply = {"choices": [{"text": "", **choice}]}
    with server((200, {}, reply)) as (url, _), pytest.raises(NoAnswer):
        client(url).ask({"ask": "slots", "prompt": "a\t?", "at": [2]})


@pytest.mark.parametrize("style", ["text", "chat"])
def test_a_server_that_can_do_nothing_lacks_every_mode(style, tmp_path):
    words = "logprobs: no prompt logprobs .*404.*detection: no " + style
    missing = 404, {}, {"error": "no such path"}
    with server(missing) as (url, _), pytest.raises(UserError, match=words):
        judge(tmp_path, url, rung="auto", style=style)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", ["nonsense", '[[" a", 1]]', "[]", '{" a": 1}'])
def test_a_server_that_answers_wrongly_is_refused(pairs, tmp_path):
    """Every simulation of the probe is missing; none is taken for zeros."""
    reply = 200, {}, {"choices": [{"message": {"content": pairs}}]}
    words = "wins for 0 of 3 planted neurons, 27 of 27 sim"
    with server(reply) as (url, _), pytest.raises(UserError, match=words):
        judge(tmp_path, url, rung="json", style="chat")


# ---- the key -------------------------------------------------------------------------------------


def once(post):
    """HttpClient._post without a second try."""

    def post_once(self, *args):
        self.tries = 1
        return post(self, *args)

    return post_once


def test_the_key_is_in_no_file_and_no_message(tmp_path, monkeypatch, caplog, capsys):
    """It is sent to the server and nowhere else, even if the server sends it back."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setattr(HttpClient, "_post", once(HttpClient._post))
    messages = []
    recorded = {"rung": "json", "style": "chat", "record": str(tmp_path / "recording")}
    for status in (400, 401, 500):
        with server((status, {}, {"error": f"bad key {KEY}"})) as (url, seen):
            for changes in ({"rung": "auto"}, recorded):
                asked = Settings(simulator="http:m", url=url, key_env=KEY_ENV, **changes)
                with pytest.raises(UserError) as error:
                    pipeline.run(selected(), decode, asked, tmp_path, messages.append)
                messages += [str(error.value), repr(asked)]
        assert seen[0][2]["Authorization"] == f"Bearer {KEY}"
    outputs = [caplog.text, *capsys.readouterr(), *messages]
    outputs += [path.read_text() for path in tmp_path.iterdir()]
    assert len(messages) >= 12
    assert not any(KEY in output for output in outputs)
    assert any("***" in output for output in outputs)


def test_the_key_travels_to_one_host_only(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with server(FINE) as (other, stolen):
        moved = 302, {"Location": f"{other}/completions"}, {}
        with server(moved) as (url, _), pytest.raises(UserError, match="302"):
            client(url).ask(QUERY)
    assert not stolen
    with pytest.raises(UserError, match="unencrypted"):
        client("http://models.example.org/v1")
    client("https://models.example.org/v1")


def test_a_server_elsewhere_needs_a_key(monkeypatch):
    monkeypatch.delenv(KEY_ENV, raising=False)
    with pytest.raises(UserError, match=f"models.example.org needs a key: .*{KEY_ENV}"):
        client("https://models.example.org/v1")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hosts",
        "127.0.0.1:8080/v1",
        "ftp://127.0.0.1/v1",
        "http://me@127.0.0.1/v1",
        "",
    ],
)
def test_what_is_not_a_base_url_is_refused(url):
    with pytest.raises(UserError, match="not a base URL"):
        client(url)
