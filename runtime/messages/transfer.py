"""KV that moves: between a router and engines, and between engines."""

from __future__ import annotations

from msgspec import Struct

from microserve.runtime.messages.base import Int64, LeaseId, Message, Name, NonNegative, PageBytes, Seconds, TokenBytes
from microserve.runtime.messages.membership import Layout


class KvAddress(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where KV of a prepared prompt is to go: a lease on `engine_id` of `epoch`.

    Positions `[matched, end)` are awaited; `pages` are the receiver's page numbers for them, in order of position,
    the first for position `matched` (a multiple of the page size). When `matched >= end` nothing is awaited.
    """

    engine_id: str
    epoch: Int64
    endpoint: str
    """The receiver's API endpoint, where a sender claims."""
    lease: LeaseId
    matched: Int64
    end: Int64
    pages: PageBytes
    layout: Layout


class PrepRecv(Message, tag="prep_recv", frozen=True):
    """Match the prompt, lock what matched, allocate pages for `[matched, end)`, open a lease. Reply: `Prepared`.

    `end` None is the prompt's length; negative counts from the end. `expect_tokens`: output tokens that room is kept
    for. `admit_by`: seconds until it is refused as `busy`; without it, at once.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    end: Int64 | None = None
    expect_tokens: NonNegative = 0
    admit_by: Seconds | None = None


class Prepared(Message, tag="prepared", frozen=True):
    address: KvAddress


class RemoteSend(Message, tag="remote_send", frozen=True):
    """Produce KV for `[begin, end)` and push it into the receiver's pages. Reply: `SendReport`.

    `begin` is page-aligned and at least the address's `matched`; `end` at most its `end`. An empty range succeeds.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    address: KvAddress
    begin: Int64
    end: Int64 | None = None


class SendReport(Message, tag="send_report", frozen=True):
    """Of the tokens in the range, how many were `computed` for this call and how many `reused` from the prefix tree."""

    computed: int
    reused: int
    bytes: int
    seconds: float
    """From the call's arrival to the end of the last push."""
    push_seconds: float = 0.0
    """Spent in pushes."""


class Commit(Message, tag="commit", frozen=True):
    """Complete pages that arrived enter the prefix tree without generating, and the lease ends. Reply: `Committed`.

    Waits, at most `wait` seconds, for what has not arrived. None: as long as the engine lets a generation wait.
    """

    request_id: Name
    sub_id: Name
    lease: LeaseId
    wait: Seconds | None = None


class Committed(Message, tag="committed", frozen=True):
    committed_until: int


class Release(Message, tag="release", frozen=True):
    """Ends a lease. Idempotent. Reply: `Released`."""

    lease: LeaseId


class Forgo(Message, tag="forgo", frozen=True):
    """KV for `[begin, end)` of a lease will not come: who waits for it computes it. Idempotent. Reply: `Released`."""

    lease: LeaseId
    begin: Int64
    end: Int64


class Released(Message, tag="released", frozen=True):
    outcome: str
    """"freed", "quarantined" (a transfer may still be under way; the pages come back later) or "unknown"."""


class PeerHello(Message, tag="peer_hello", frozen=True):
    """An engine to another: who I am, what my pages look like, how my pool is reached. Reply: `PeerWelcome`.

    `host`, `pid` and `pid_started` (clock ticks since boot) let a receiver on the same host prove a sender dead.
    """

    engine_id: Name
    epoch: Int64
    endpoint: str
    layout: Layout
    transport: str
    metadata: bytes
    host: str = ""
    pid: Int64 = 0
    pid_started: Int64 = 0


class PeerWelcome(Message, tag="peer_welcome", frozen=True):
    engine_id: Name
    epoch: Int64
    layout: Layout
    transport: str
    metadata: bytes
    host: str = ""
    pid: Int64 = 0
    pid_started: Int64 = 0


class Claim(Message, tag="claim", frozen=True):
    """A sender asks for the right to write `[begin, end)` of a lease; one writer a range, ever. Reply: `Claimed`.

    `sub_id` names the send that it is for: asked again for the same one, the answer is the same claim. `digest`
    (BLAKE2b of 16 bytes over the token bytes before `end`) lets the receiver refuse KV of another prompt.
    """

    lease: LeaseId
    epoch: Int64
    """The receiver's, from the address: a stale one is refused."""
    begin: Int64
    end: Int64
    engine_id: Name
    sender_epoch: Int64
    sub_id: Name = ""
    digest: bytes = b""


class Claimed(Message, tag="claimed", frozen=True):
    claim: NonNegative
    term: Seconds
    """The sender counts from when it asked, and posts nothing after it."""
    pages: PageBytes = b""
    """The receiver's pages for the range, in order of position."""


class ClaimEnded(Message, tag="claim_ended", frozen=True):
    """The transport has really finished with the pages of a claim. Idempotent. Reply: `Ok`. `error` "" means done."""

    claim: NonNegative
    error: str = ""


class PeerAddress(Struct, frozen=True, kw_only=True):
    engine_id: str
    epoch: Int64
    endpoint: str


class Meet(Message, tag="meet", frozen=True):
    """A router to an engine: the others of your model; it connects to those that it does not know. Reply: `Ok`."""

    peers: list[PeerAddress]
