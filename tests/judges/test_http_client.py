"""A scripted server that fails: what is tried again, what counts as missing, what is refused."""

import json
import re
import socket
import time
from email.utils import formatdate

import pytest
from scripted_server import CHAT, FINE, KEY_ENV, QUERY, USAGE, client, judge, server

from crate_mini import UserError
from crate_mini.judges import http_client
from crate_mini.judges.http_client import HttpClient
from crate_mini.judges.queries import NoAnswer

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
        {"choices": {"0": 1}},
        {"choices": [{"text": 7}]},
        b"[" * 100_000,
        b'{"choices":' * 100_000,
        b"\xff\xfe",
        b"1e999999",
    ],
    ids=range(12),
)
def test_nonsense_counts_as_missing(body):
    with server((200, {}, body)) as (url, seen), pytest.raises(NoAnswer) as error:
        client(url).ask(QUERY)
    assert re.search("not OpenAI's|too deeply nested", str(error.value))
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
    words = f"^m gives no usable answers .logprobs: no prompt.*404.*such path.*; json: no {style} "
    missing = 404, {}, {"error": "no such path"}
    with server(missing) as (url, _), pytest.raises(UserError, match=words):
        judge(tmp_path, url, rung="auto", style=style)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", ["nonsense", '[[" a", 1]]', "[]", '{" a": 1}'])
def test_a_server_that_answers_wrongly_is_refused(pairs, tmp_path):
    """Every simulation of the probe is missing; none is taken for zeros."""
    reply = 200, {}, {"choices": [{"message": {"content": pairs}}]}
    words = "no usable answers .json: 72 of 72 questions unanswered .mostly: (no JSON|another num)"
    with server(reply) as (url, _), pytest.raises(UserError, match=words):
        judge(tmp_path, url, rung="json", style="chat")


def test_a_reply_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(http_client, "LARGEST_REPLY", 1000)
    with server((200, {}, b" " * 1001)) as (url, _), pytest.raises(NoAnswer, match="1,000 bytes"):
        client(url).ask(QUERY)
    with server((500, {}, b"x" * 200_000)) as (url, _), pytest.raises(NoAnswer, match="too long"):
        client(url, tries=1).ask(QUERY)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1.5", "null", '"x"', "[]", "1e999"])
def test_a_log_probability_that_cannot_be_one_is_no_answer(value):
    body = '{"choices": [{"logprobs": {"tokens": ["a", "\\t", "?", "x"], "top_logprobs": '
    body += f'[null, {{}}, {{"3": {value}}}, null]}}}}]}}'
    slots = {"ask": "slots", "prompt": "a\t?", "at": [2]}
    with server((200, {}, body.encode())) as (url, _), pytest.raises(NoAnswer):
        client(url).ask(slots)
    good = body.replace(value, "-Infinity").encode()  # some servers write this for "never"
    with server((200, {}, good)) as (url, _):
        assert client(url).ask(slots)["slots"] == [{"3": -99}]


@pytest.mark.parametrize("tokens", [None, -5, 10**30, "many", True, float("inf"), [1]])
def test_impossible_counts_of_tokens_count_as_unknown(tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": 2}
    body = json.dumps({"choices": [{"text": "yes"}], "usage": usage}).encode()
    with server((200, {}, body)) as (url, _):
        assert client(url).ask(QUERY)["tokens"] == [0, 2]


# ---- refusals ------------------------------------------------------------------------------------


def chat_reply(content, **facts):
    choice = {"message": {"content": content}, **facts}
    return 200, {}, {"choices": [choice], "usage": USAGE}


@pytest.mark.parametrize(
    "reply, reason",
    [
        (chat_reply("no", finish_reason="content_filter"), "content filter"),
        (chat_reply(None, finish_reason="length"), "does the model reason first"),
        (chat_reply(""), "an empty answer"),
        (chat_reply(" \n"), "an empty answer"),
        (
            (200, {}, {"choices": [{"message": {"content": None, "refusal": "I won't."}}]}),
            "I won't",
        ),
        ((400, {}, {"error": {"message": "flagged", "code": "content_filter"}}), "400: flagged"),
        ((422, {}, {"detail": "bad"}), "422: bad"),
    ],
)
def test_a_refusal_of_one_question_is_told_with_its_reason(reply, reason):
    with server(reply) as (url, _), pytest.raises(NoAnswer, match=reason):
        client(url).ask(CHAT)


@pytest.mark.parametrize(
    "status, message, expected",
    [
        (401, "no such key", f"401: no such key.; is the key in {KEY_ENV} right"),
        (402, "pay", f"402: pay.; is the account behind {KEY_ENV} paid up"),
        (403, "not you", f"403: not you.; may the key in {KEY_ENV} use this model"),
        (429, "quota", "429: quota.; the quota is used up"),
        (404, "model 'm' not found, try pulling it first", "does not serve m .status 404: model"),
        (404, "The model `m` does not exist or you do not have access", "does not serve m"),
        (400, "m is not a valid model ID", "does not serve m"),
        (400, "echo is not supported", "m gives no usable answers .*400: echo is not supported"),
        (400, "Unknown parameter for this model", "m gives no usable answers .*Unknown parameter"),
    ],
)
def test_a_server_that_refuses_everything_is_not_called_a_bad_judge(
    status, message, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(HttpClient, "_post", once(HttpClient._post))
    reply = status, {}, {"error": {"message": message}}
    with server(reply) as (url, _), pytest.raises(UserError, match=expected) as error:
        judge(tmp_path, url, rung="auto", key_env=KEY_ENV)
    assert "does not tell" not in str(error.value)


def once(post):
    """HttpClient._post without a second try."""

    def post_once(self, *args):
        self.tries = 1
        return post(self, *args)

    return post_once


def test_a_moved_server_is_named():
    moved = 308, {"Location": "https://elsewhere.example/v1"}, {}
    with (
        server(moved) as (url, _),
        pytest.raises(UserError, match="redirects to https://elsewhere"),
    ):
        client(url).ask(QUERY)


# ---- parameters that models of today refuse ------------------------------------------------------


def test_max_tokens_is_negotiated_once():
    def picky(path, body):
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {}, {"error": {"message": message}}
        return chat_reply("yes")

    with server(picky) as (url, seen):
        asking = client(url)
        for _ in range(3):
            assert asking.ask(CHAT)["text"] == "yes"
    bodies = [body for _, _, _, body in seen]
    assert len(bodies) == 4  # one refusal, then never again
    assert bodies[0]["max_tokens"] == 3
    assert all(body["max_completion_tokens"] >= 1000 for body in bodies[1:])  # models think first


def test_a_temperature_that_is_refused_is_left_out():
    def picky(path, body):
        if "max_tokens" in body or "temperature" in body:
            word = "max_completion_tokens" if "max_tokens" in body else "'temperature' must be 1"
            return 400, {}, {"error": {"message": f"use {word}"}}
        return chat_reply("yes")

    with server(picky) as (url, seen):
        asking = client(url)
        assert asking.ask(CHAT)["text"] == asking.ask(CHAT)["text"] == "yes"
    assert len(seen) == 4


def test_a_server_that_refuses_every_spelling_is_left_alone():
    refused = 400, {}, {"error": "max_completion_tokens and temperature are wrong"}
    with server(refused) as (url, seen), pytest.raises(NoAnswer, match="status 400: max_comp"):
        client(url).ask(CHAT)
    assert len(seen) == 3


def test_an_answer_in_parts_is_joined():
    parts = [{"type": "text", "text": "y"}, {"type": "image"}, {"type": "text", "text": "es"}]
    with server(chat_reply(parts)) as (url, _):
        assert client(url).ask(CHAT)["text"] == "yes"
