"""What the step thread has to tell: pieces and ends of generations, of sends, of preparations and of commits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from microserve.engine.plan import PageArray, TokenArray
    from microserve.engine.request import Request
    from microserve.kv.leases import Lease
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import Committed, Generated, Tokens


class Prepare(Struct, eq=False, kw_only=True):
    """A `prep_recv` under way. `tokens` int32 [n] is the whole prompt; KV of positions below `end` is awaited.

    `admit_by` is monotonic seconds: until then it waits for room; None: it is refused at once. The lease belongs to
    `owner`, a session.
    """

    request_id: str
    sub_id: str
    tokens: TokenArray
    end: int
    expect_tokens: int
    admit_by: float | None
    owner: object


class CommitTicket(Struct, eq=False, kw_only=True):
    """A `commit` under way."""

    request_id: str
    sub_id: str
    lease: int


class Opened(Struct, frozen=True):
    """The answer to `Prepare`. The lease is read, and never changed, outside the step thread."""

    lease: Lease


class Ready(Struct, frozen=True):
    """A send's KV of the pages from the `first` of its prompt on is complete, in our `pages`, int32 [n]."""

    first: int
    pages: PageArray


class Computed(Struct, frozen=True):
    """All of a send's KV is complete: the first `reused` tokens were in the prefix tree."""

    reused: int


class Output(Struct, frozen=True):
    """Something to tell the caller of `request`; a final one is the last.

    A generation gets `Tokens`, then `Generated`; a send gets `Ready` and `Computed`, none of them final: its
    coordinator ends it with `Scheduler.finish_send`; a `Prepare` gets `Opened`, a `CommitTicket` gets `Committed`.
    Each may get an error, which is final.
    """

    request: Request | Prepare | CommitTicket
    body: Tokens | Generated | Ready | Computed | Opened | Committed | MicroserveError
    final: bool
