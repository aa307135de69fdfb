"""The key to a server: where it may travel, and how it is kept out of everything that is shown.

It is read once from an environment variable, sent in one header to one host, over https or to this
machine itself, and replaced by *** in whatever a server sends back, before anything is cut, cached,
recorded or printed.
"""

import ipaddress
import json
import os
import re
from urllib.parse import quote

from crate_mini import UserError

SHORTEST = 8  # characters; a shorter key is a dummy for a local server, and might be any word
BASE_URL = re.compile(r"(https?)://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^\s?#@]*)?")


def scheme_and_host(url):
    """("http" or "https", host) of a base URL; raises UserError for anything else."""
    parts = BASE_URL.fullmatch(url)
    if not parts:
        raise UserError(f"--url {url!r} is not a base URL; it looks like http://127.0.0.1:8080/v1.")
    return parts[1], parts[2].lower()


def is_this_machine(host):
    """Whether a host is a loopback address; a name that only begins like one is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class ServerKey:
    """The key in an environment variable for the server at a base URL.

    Raises UserError where the key is missing, cannot be sent, or would travel unencrypted.
    """

    def __init__(self, variable, url):
        if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):  # do not show it: it may be a key
            raise UserError(
                "--key-env takes the name of an environment variable that holds the key, like "
                "OPENAI_API_KEY, not the key itself."
            )
        self.variable = variable
        self._key = os.environ.get(variable, "").strip()
        scheme, host = scheme_and_host(url)
        self.local = is_this_machine(host)
        if not self._key and not self.local:
            raise UserError(f"{host} needs a key: put it into the environment variable {variable}.")
        if self._key and scheme == "http" and not self.local:
            raise UserError(
                f"{self.hidden(url)} would carry the key in {variable} over the network "
                f"unencrypted: use https, or unset {variable} if the server needs no key."
            )
        if not re.fullmatch(r"[!-~]*", self._key):
            raise UserError(
                f"the key in {variable} holds a space or a character that no key has; set it again."
            )

    def headers(self):
        """The HTTP headers that carry the key."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def hidden(self, text):
        """A text, in one line, with *** for the key, however it is escaped."""
        if self._key:
            spellings = {self._key, json.dumps(self._key)[1:-1]}
            spellings |= {spelling.replace("/", r"\/") for spelling in spellings}
            spellings |= {quote(self._key), quote(self._key, safe="")}
            for spelling in sorted(spellings, key=len, reverse=True):
                text = text.replace(spelling, "***")
        return " ".join(text.split())

    def hidden_in(self, value):
        """A JSON value with *** for the key in every string and name."""
        if len(self._key) < SHORTEST:
            return value
        if isinstance(value, str):
            return value.replace(self._key, "***")
        if isinstance(value, list):
            return [self.hidden_in(item) for item in value]
        if isinstance(value, dict):
            pairs = value.items()
            return {self.hidden_in(name): self.hidden_in(item) for name, item in pairs}
        return value
