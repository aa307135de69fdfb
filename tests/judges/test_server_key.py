"""The key to a server: to which hosts it travels, and that nothing shows it."""

import json
import logging
from urllib.parse import quote

import pytest
from planted_excerpts import decode, selected
from scripted_server import CHAT, FINE, KEY, KEY_ENV, QUERY, USAGE, client, server

from crate_mini import UserError
from crate_mini.judges import answer_cache, http_client, pipeline
from crate_mini.judges.command import Settings
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.queries import NoAnswer
from crate_mini.judges.server_key import ServerKey


@pytest.fixture
def key(monkeypatch):
    """A key in the environment."""
    monkeypatch.setenv(KEY_ENV, KEY)
    return KEY


# ---- where it travels ----------------------------------------------------------------------------


def test_a_redirect_to_another_host_does_not_get_the_key(key):
    with server(FINE) as (other, stolen):
        moved = 302, {"Location": f"{other}/completions"}, {}
        with server(moved) as (url, seen), pytest.raises(UserError, match="302"):
            client(url).ask(QUERY)
    assert seen[0][2]["Authorization"] == f"Bearer {KEY}"
    assert not stolen


def test_a_proxy_does_not_see_what_goes_to_this_machine(key, monkeypatch):
    with server(FINE) as (proxy, passed), server(FINE) as (url, seen):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert client(url).ask(QUERY)["text"] == "yes"
    assert not passed
    assert seen[0][2]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "host",
    [
        "models.example.org",
        "127.0.0.1.evil.example",
        "127.evil.example",
        "localhost.evil.example",
        "127.1",
        "0.0.0.0",
        "10.0.0.1",
        "[::2]",
        "[::ffff:10.0.0.1]",
    ],
)
def test_plain_http_carries_the_key_to_this_machine_only(host, key):
    with pytest.raises(UserError, match="over the network unencrypted"):
        client(f"http://{host}/v1")
    client(f"https://{host}/v1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "LOCALHOST", "[::1]"])
def test_this_machine_is_known_by_its_address(host, key, monkeypatch):
    assert client(f"http://{host}:8080/v1").key.local
    monkeypatch.delenv(KEY_ENV)
    client(f"http://{host}:8080/v1")  # and needs no key


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
        "http://127.0.0.1\\@evil.example/v1",
        "http://127.0.0.1#.evil.example/v1",
        "http://127.0.0.1?.evil.example/v1",
        "http://127.0.0.1/v1?key=1",
        "http://127.0.0.1/v1 x",
        "http://127.0.0.1/v1\r\nX: y",
        "http://127.0.0.1:port/v1",
        "http:///v1",
        "",
    ],
)
def test_what_is_not_a_base_url_is_refused(url):
    with pytest.raises(UserError, match="not a base URL"):
        client(url)


@pytest.mark.parametrize("broken", ["sk-a b", "sk-a\r\nX-Evil: 1", "sk-ä"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(broken, monkeypatch):
    monkeypatch.setenv(KEY_ENV, broken)
    with pytest.raises(UserError, match=f"the key in {KEY_ENV} holds a space") as error:
        client("https://models.example.org/v1")
    assert broken not in str(error.value)


def test_the_line_end_of_a_key_is_dropped(monkeypatch):
    monkeypatch.setenv(KEY_ENV, f"{KEY}\r\n")
    with server(FINE) as (url, seen):
        client(url).ask(QUERY)
    assert seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_key_in_the_place_of_its_variable_is_not_shown():
    with pytest.raises(UserError, match="not the key itself") as error:
        HttpClient("m", "http://127.0.0.1/v1", KEY)
    assert KEY not in str(error.value)


# ---- what shows it -------------------------------------------------------------------------------


def once(post):
    """HttpClient._post without a second try."""

    def post_once(self, *args):
        self.tries = 1
        return post(self, *args)

    return post_once


def test_the_key_is_in_no_file_and_no_message(key, tmp_path, monkeypatch, caplog, capsys):
    """It is sent to the server and nowhere else, even if the server sends it back."""
    caplog.set_level(logging.DEBUG)
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


def answer(text):
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": USAGE}


def test_an_answer_that_holds_the_key_is_cached_and_recorded_without_it(key, tmp_path):
    with server(answer(f"you sent {KEY}")) as (url, _):
        cache = answer_cache.AnswerCache(tmp_path / "cache")
        model = LanguageModel("http:m", cache, url, KEY_ENV, style="chat")
        assert model.ask(CHAT)["text"] == "you sent ***"
        cache.record(tmp_path / "record", {})
    for name in ("cache", "record"):
        content = (tmp_path / name).read_text()
        assert "you sent ***" in content
        assert KEY not in content


@pytest.mark.parametrize("escape", [lambda key: "".join(f"\\u{ord(c):04x}" for c in key), str])
def test_an_escaped_key_in_a_reply_is_masked_too(escape, key):
    body = f'{{"choices": [{{"message": {{"content": "{escape(KEY)}"}}}}]}}'
    with server((200, {}, body.encode())) as (url, _):
        assert client(url).ask(CHAT)["text"] == "***"


def test_the_key_is_masked_in_names_and_nested_values(key):
    value = {KEY: [KEY, {"a": f"x{KEY}y"}, 3, None]}
    hidden = ServerKey(KEY_ENV, "http://127.0.0.1/v1").hidden_in(value)
    assert hidden == {"***": ["***", {"a": "x***y"}, 3, None]}


@pytest.mark.parametrize("before", range(130, 320, 7))
def test_the_key_is_masked_before_a_message_is_cut(before, key, monkeypatch):
    """No part of it is left at the cut, wherever it falls."""
    for body in ("x" * before + KEY, json.dumps({"error": "x" * before + KEY})):
        with server((400, {}, body.encode())) as (url, _), pytest.raises(NoAnswer) as error:
            client(url).ask(QUERY)
        assert KEY[:2] not in str(error.value)


def test_the_key_is_masked_where_the_reading_of_a_message_ends(key, monkeypatch):
    for limit in range(100, 130, 5):
        monkeypatch.setattr(http_client, "LARGEST_ERROR", limit)
        body = ("x" * 100 + KEY + "y" * 100).encode()
        with server((400, {}, body)) as (url, _), pytest.raises(NoAnswer) as error:
            client(url).ask(QUERY)
        assert KEY[:2] not in str(error.value)


@pytest.mark.parametrize("spelling", [quote, json.dumps, lambda key: key.replace("/", r"\/")])
def test_other_spellings_of_the_key_are_masked(spelling, monkeypatch):
    odd = 'sk-a/b+c"d=e'
    monkeypatch.setenv(KEY_ENV, odd)
    hidden = ServerKey(KEY_ENV, "http://127.0.0.1/v1").hidden(f"got {spelling(odd)} from you")
    assert "sk-a" not in hidden


def test_a_dummy_key_does_not_change_answers(monkeypatch):
    """Many local servers are given "1" or "x" for a key."""
    monkeypatch.setenv(KEY_ENV, "1")
    with server(answer("1")) as (url, _):
        assert client(url).ask(CHAT)["text"] == "1"


def test_a_key_in_the_url_is_masked_in_messages(key):
    refused = 401, {}, {"error": "no"}
    with server(refused) as (url, _), pytest.raises(UserError) as error:
        client(f"{url}/{KEY}").ask(QUERY)
    assert KEY not in str(error.value)
