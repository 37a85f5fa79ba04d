"""Calls and their answers, and which bodies they may have."""

from __future__ import annotations

from microserve.runtime.messages.base import CallId, ErrorInfo, Message, Name, Seconds
from microserve.runtime.messages.cache import (
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    CachePin,
    CachePrefixes,
    CacheUnpin,
    Prefixes,
)
from microserve.runtime.messages.clients import (
    Detokenize,
    Detokenized,
    Finished,
    Generate,
    ListModels,
    Models,
    Status,
    StatusReply,
    TextChunk,
    Tokenize,
    Tokenized,
)
from microserve.runtime.messages.generation import Abort, Aborted, Generated, StartGenerate, Tokens
from microserve.runtime.messages.membership import (
    Announce,
    Drain,
    EngineEvent,
    Heartbeat,
    Info,
    InfoReply,
    Leave,
    Ok,
    Resume,
    Stats,
    StatsReply,
)
from microserve.runtime.messages.operators import (
    AbortRequest,
    Events,
    ListEvents,
    ListRequests,
    ListStrategies,
    Requests,
    RollbackStrategy,
    SetStrategy,
    Strategies,
    StrategySet,
)
from microserve.runtime.messages.session import Bye, Hello, Ping, Pong, Welcome
from microserve.runtime.messages.transfer import (
    Claim,
    Claimed,
    ClaimEnded,
    Commit,
    Committed,
    Forgo,
    Meet,
    PeerHello,
    PeerWelcome,
    Prepared,
    PrepRecv,
    Release,
    Released,
    RemoteSend,
    SendReport,
)

EngineVerb = (
    StartGenerate
    | PrepRecv
    | RemoteSend
    | Commit
    | Release
    | Forgo
    | Abort
    | PeerHello
    | Claim
    | ClaimEnded
    | Meet
    | CacheMatch
    | CachePin
    | CacheUnpin
    | CacheEvict
    | CachePrefixes
    | Info
    | Stats
    | Drain
    | Resume
)


class EngineCall(Message, tag="engine_call", frozen=True):
    """A client to a router: make this call on that engine. Replies are the engine's own, parts included."""

    engine_id: Name
    body: EngineVerb


RouterVerb = (
    Announce
    | Heartbeat
    | Leave
    | Generate
    | ListModels
    | Tokenize
    | Detokenize
    | Status
    | ListStrategies
    | SetStrategy
    | RollbackStrategy
    | ListRequests
    | AbortRequest
    | ListEvents
    | EngineCall
)
ReplyBody = (
    Ok
    | Tokens
    | Generated
    | Aborted
    | Prepared
    | SendReport
    | Committed
    | Released
    | PeerWelcome
    | Claimed
    | CacheMatched
    | CacheEvicted
    | Prefixes
    | InfoReply
    | StatsReply
    | TextChunk
    | Finished
    | Models
    | Tokenized
    | Detokenized
    | StatusReply
    | Strategies
    | StrategySet
    | Requests
    | Events
)


class Call(Message, tag="call", frozen=True):
    """Start a call. `budget` is the seconds that remain for all of it; the receiver stamps a deadline on arrival."""

    id: CallId
    body: EngineVerb | RouterVerb
    budget: Seconds | None = None


class Part(Message, tag="part", frozen=True):
    """One piece of a streamed answer; never terminal."""

    id: CallId
    body: ReplyBody


class Reply(Message, tag="reply", frozen=True):
    """The terminal answer of a call that succeeded."""

    id: CallId
    body: ReplyBody


class Failure(Message, tag="failure", frozen=True):
    """The terminal answer of a call that failed. `id` None: the call's frame could not be decoded."""

    id: CallId | None
    error: ErrorInfo


class Cancel(Message, tag="cancel", frozen=True):
    """The caller no longer wants the answer. The callee still sends one terminal (usually `cancelled`)."""

    id: CallId


class Batch(Message, tag="batch", frozen=True):
    """Answers of many calls in one message: what an engine's step sends to one router."""

    items: list[Part | Reply | Failure]


RpcMessage = Call | Part | Reply | Failure | Cancel | Batch
AnyMessage = Hello | Welcome | Ping | Pong | Bye | Call | Part | Reply | Failure | Cancel | Batch | EngineEvent
