"""A router's HTTP door: whether it would take a request, how long its certificate lasts, and what time it is there."""

from __future__ import annotations

import email.utils
import http.client
import json
import ssl
import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.runtime.keys import is_loopback
from microserve.tools.checks.finding import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.tools.checks.finding import Finding

_APART = 3.0
"""Seconds that clocks may differ: the time that HTTP tells is of whole seconds."""
_RENEW = 14 * 86400.0
"""Seconds before its end that a certificate should be renewed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the door said to `GET /ready`."""

    status: int
    body: bytes
    date: float | None = None
    """The router's time (Unix time, seconds)."""
    asked: float = 0.0
    """Ours, in the middle of the call."""
    expires: float | None = None
    """When its certificate ends."""


def ask_ready(url: str, seconds: float, *, now: Callable[[], float] = time.time) -> Answer:
    """`GET /ready`. Raises `OSError` and `http.client.HTTPException`."""
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").replace("0.0.0.0", "127.0.0.1")
    made = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = made(host, parts.port, timeout=seconds)
    expires = None
    try:
        connection.connect()
        # As long as there is a connection.
        if isinstance(connection.sock, ssl.SSLSocket) and (certificate := connection.sock.getpeercert()):
            expires = float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))
        began = now()
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = response.read()
        ended = now()
    finally:
        connection.close()
    date = response.getheader("date")
    when = None if date is None else email.utils.parsedate_to_datetime(date).timestamp()
    return Answer(response.status, body, when, (began + ended) / 2, expires)


def check_http(
    router: str, url: str, bus: str, seconds: float, ask: Callable[[str, float], Answer] = ask_ready
) -> list[Finding]:
    """The door of `router`, whose bus is at `bus`."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if is_loopback(host) and not is_loopback(bus):
        return [ok("http", f"router {router} serves HTTP on its own machine alone ({url})")]
    try:
        answer = ask(url, seconds)
    except ssl.SSLCertVerificationError as error:
        words = f"{url}: its certificate is not trusted here: {error.verify_message}"
        return [note("http", words, "clients need its authority (SSL_CERT_FILE), and the name that stands in it")]
    except (OSError, http.client.HTTPException) as error:
        words = f"router {router} does not answer HTTP at {url}: {str(error) or type(error).__name__}"
        return [problem("http", words, "see its log, and whether a firewall or a proxy stands between")]
    return [*judge_ready(router, url, answer), *judge_time(router, answer)]


def judge_ready(router: str, url: str, answer: Answer) -> list[Finding]:
    """Whether a request would be taken now."""
    findings = []
    if answer.expires is not None and (left := answer.expires - answer.asked) < _RENEW:
        words = f"the certificate of {url} ends in {left / 86400:.0f} days"
        findings.append(note("http", words, "renew it; the router reads tls_cert and tls_key again by itself"))
    if answer.status == 200:
        return [ok("http", f"router {router} takes requests at {url}"), *findings]
    try:
        reasons = "; ".join(json.loads(answer.body)["reasons"])
    except (ValueError, KeyError, TypeError):
        reasons = f"status {answer.status}"
    if answer.status == 503:
        words = f"router {router} takes no requests at {url}: {reasons}"
        return [problem("http", words, "see the engines here, and `microserve engines`"), *findings]
    return [note("http", f"{url} answers /ready with {reasons}", "is it a router, or a proxy before it?"), *findings]


def judge_time(router: str, answer: Answer) -> list[Finding]:
    """The difference of its clock and ours."""
    if answer.date is None:
        return []
    # The date is cut off to whole seconds, and may be one old.
    apart = answer.date + 1.0 - answer.asked
    if abs(apart) <= _APART:
        return [ok("clock", f"the clock of router {router} agrees with ours")]
    words = f"the clock of router {router} is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} ours"
    return [note("clock", words, "keep both right (NTP): else their logs cannot be compared")]
