"""A server on this machine that answers by a script, and a client for it that does not wait."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from planted_excerpts import run

from crate_mini.judges.http_client import HttpClient

KEY = "sk-secret-0123456789"
KEY_ENV = "CRATE_TEST_KEY"
QUERY = {"ask": "text", "prompt": "say", "most": 3}
CHAT = {"ask": "text", "chat": [["user", "say"]], "most": 3}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
FINE = (200, {}, {"choices": [{"text": "yes"}], "usage": USAGE})


@contextmanager
def server(*script):
    """(base URL, requests seen) of a server that answers by a script.

    An entry is (status, headers, body), or None to cut the connection, or a function of the path
    and the JSON body that returns one; the last one is repeated. A request is (time, path, headers,
    JSON body).
    """
    seen, remaining = [], list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((time.monotonic(), self.path, dict(self.headers), body))
            entry = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if callable(entry):
                entry = entry(self.path, body)
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
