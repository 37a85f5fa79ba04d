"""One request as the engine sees it: its tokens, its pages, its place in the life cycle."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from microserve.runtime.errors import InternalError

if TYPE_CHECKING:
    from microserve.engine.plan import PageArray, TokenArray
    from microserve.kv.cache import PrefixLock
    from microserve.runtime.messages import SamplingParams

_SPARE_TOKENS = 64
"""Room for output that a history has from the start; it doubles from there."""

NEVER = 1 << 62
"""A position that is never reached."""


class State(enum.Enum):
    """Where a request stands. `Request.move` is the only way from one to another."""

    WAITING = "waiting"
    """Accepted, never run: it holds no pages."""
    PREFILL = "prefill"
    """Admitted: it owns the pages of everything known, and part of that is not launched yet."""
    DECODE = "decode"
    """Everything known has been launched: one token a step from here on."""
    RECEIVING = "receiving"
    """Accepted; its KV is on its way from another engine, into pages that its lease holds."""
    SENDING = "sending"
    """A send of which everything is launched or given up: it keeps its pages until the transfer has ended."""
    PREEMPTED = "preempted"
    """Its pages were taken for an older request; it waits to recompute them. What was streamed stays streamed."""
    FINISHED = "finished"
    """Ended with `Generated`."""
    FAILED = "failed"
    """Ended with a typed error."""
    ABORTED = "aborted"
    """Ended by its caller, who has been answered already."""


FINAL = frozenset({State.FINISHED, State.FAILED, State.ABORTED})
"""States without a way out: the terminal reply has been produced."""

ADMITTED = frozenset({State.PREFILL, State.DECODE})
"""States that hold pages and take part in steps."""

HOLDING = ADMITTED | {State.SENDING}
"""States that hold pages."""

TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: FINAL | {State.PREFILL, State.RECEIVING, State.SENDING},
    State.RECEIVING: FINAL | {State.WAITING},
    State.PREFILL: FINAL | {State.DECODE, State.SENDING, State.PREEMPTED},
    State.SENDING: FINAL,
    State.DECODE: FINAL | {State.PREEMPTED},
    # A step that was launched before the preemption may still bring the last token.
    State.PREEMPTED: FINAL | {State.PREFILL},
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.ABORTED: frozenset(),
}


class ReceivedKv(Protocol):
    """KV that other engines put into our pages for one request. One of its methods is called, once."""

    begin: int
    """The position where computing begins, at the latest."""
    pages: int
    """How many pages there are: of what was matched, of what came, and in reserve."""

    def take(self) -> tuple[PrefixLock, PageArray, int]:
        """The lock on what was matched, the pages after it (now OWNED), and `begin`."""
        ...

    def keep(self) -> None:
        """The request goes on without it; whole pages enter the prefix tree."""
        ...

    def drop(self) -> None:
        """The request ends without it."""
        ...


class Request:
    """One generation, or with `sends` one send: KV of its whole prompt, and no token.

    Built by whoever receives the call, owned by the scheduler from `Scheduler.submit` on.

    `prompt` int32 [n] includes `prior_output` tokens that were generated elsewhere; `prompt_length` does not.
    `admit_by`, `first_token_by` and `deadline` are monotonic seconds.
    """

    __slots__ = (
        "admit_by",
        "builds",
        "cached",
        "computed",
        "deadline",
        "end",
        "entered",
        "first_token_by",
        "history",
        "id",
        "in_flight",
        "insert_at",
        "introduced",
        "known",
        "kv",
        "lock",
        "min_known",
        "page_capacity",
        "page_count",
        "pages",
        "progressed",
        "prompt_length",
        "prompt_total",
        "ready_pages",
        "received",
        "recomputed",
        "request_id",
        "room",
        "sampling",
        "scheduled",
        "seed",
        "sends",
        "state",
        "stopped",
        "stops",
        "sub_id",
        "table",
        "waits_for",
    )

    def __init__(
        self,
        prompt: TokenArray,
        sampling: SamplingParams,
        *,
        seed: int = 0,
        prior_output: int = 0,
        request_id: str = "",
        sub_id: str = "",
        admit_by: float | None = None,
        first_token_by: float | None = None,
        deadline: float | None = None,
        sends: bool = False,
    ) -> None:
        self.request_id = request_id
        self.sub_id = sub_id
        self.sampling = sampling
        self.seed = seed
        self.admit_by = admit_by
        self.first_token_by = first_token_by
        self.deadline = deadline
        self.sends = sends
        self.stopped = False
        """A send that computes no more."""
        self.ready_pages = 0
        """Pages of a send that its coordinator knows of."""
        self.kv: ReceivedKv | None = None
        """What other engines sent, until it is taken or dropped."""
        self.received = 0
        """Prompt tokens whose KV came from other engines."""
        self.recomputed = 0
        """Prompt tokens whose KV should have come from other engines, and did not."""
        self.state = State.WAITING
        self.id = 0
        """The sequence number that the executor knows; given by the scheduler, in order of arrival."""
        self.prompt_total = len(prompt)
        self.prompt_length = len(prompt) - prior_output
        self.history = np.empty(len(prompt) + min(sampling.max_tokens, _SPARE_TOKENS), dtype=np.int32)
        """Prompt, then output. Only ever appended to, so that views of it may be handed out."""
        self.room = len(self.history)
        """Tokens that `history` has room for, before `append` makes more."""
        self.history[: len(prompt)] = prompt
        self.known = len(prompt)
        """Tokens in `history`."""
        self.end = NEVER
        """`known` at which the request ends with "length"."""
        self.min_known = self.prompt_length + sampling.min_tokens
        """`known` from which a stop token may end it."""
        self.stops: frozenset[int] = frozenset()
        self.cached: int | None = None
        """Prompt tokens found in the prefix tree at the first admission; None before."""
        self.waits_for: tuple[Request, int] | None = None
        """Another request that computes our prefix now, and the position up to which it is worth waiting."""
        self.builds: tuple[int, bytes] | None = None
        """The part of the prefix tree that it is computing: where it begins, and its first page."""
        self.in_flight = 0
        """Launched, unretired steps that name this request."""
        self.lock: PrefixLock | None = None
        self._reset()

    def _reset(self) -> None:
        self.table: PageArray = np.empty(0, dtype=np.int32)
        self.page_count = 0
        self.page_capacity = 0
        """Positions that the pages held cover."""
        self.pages: PageArray = self.table
        """int32 [page_count]: the pages held, in order of position. Views that were handed out never change."""
        self.scheduled = 0
        """Positions whose KV has been launched: where the next slice starts."""
        self.computed = 0
        """Positions whose KV exists: their steps have retired."""
        self.entered: float | None = None
        """When the scheduler took it, until its first step."""
        self.insert_at = NEVER
        """`computed` at which complete pages enter the prefix tree."""
        self.introduced = False
        """Whether the executor has been told of this sequence."""
        self.progressed = 0
        """The last step that computed part of the prompt."""

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def generated(self) -> int:
        """Tokens in `history` that this request generated here."""
        return self.known - self.prompt_total

    @property
    def remaining(self) -> int:
        """Known tokens that no step has been launched for."""
        return self.known - self.scheduled

    @property
    def shared_pages(self) -> int:
        """Leading pages that belong to the prefix tree (locked); the rest is owned by this request."""
        return 0 if self.lock is None else len(self.lock.pages)

    def move(self, to: State) -> None:
        """The one way from state to state. Raises `InternalError` for a move that the table does not have."""
        if to not in TRANSITIONS[self.state]:
            raise InternalError(f"request {self.sub_id or self.id}: {self.state.value} cannot become {to.value}")
        self.state = to

    def append(self, token: int) -> None:
        """One more token of output."""
        known = self.known
        if known == self.room:
            grown = np.empty(2 * known, dtype=np.int32)
            grown[:known] = self.history
            self.history = grown
            self.room = len(grown)
        self.history[known] = token
        self.known = known + 1

    def hold(self, lock: PrefixLock, owned: PageArray, page_size: int, capacity: int) -> None:
        """Takes over what an admission brought: locked pages, then owned ones. `capacity`: the most it may need."""
        shared = len(lock.pages)
        self.lock = lock
        self.table = np.empty(max(capacity, shared + len(owned)), dtype=np.int32)
        self.table[:shared] = lock.pages
        self.table[shared : shared + len(owned)] = owned
        self._count(shared + len(owned), page_size)
        self.scheduled = self.computed = lock.length

    def add_page(self, page: int, page_size: int) -> None:
        """One more owned page at the end."""
        self.table[self.page_count] = page
        self._count(self.page_count + 1, page_size)

    def share(self, lock: PrefixLock) -> None:
        """Complete pages have entered the tree: `lock` covers them, and its pages replace ours."""
        self.lock = lock
        shared = len(lock.pages)
        if not np.array_equal(self.table[:shared], lock.pages):
            # Launched steps hold views of the old table: it must not change under them.
            self.table = self.table.copy()
            self.table[:shared] = lock.pages
            self.pages = self.table[: self.page_count]

    def let_go(self) -> None:
        """Forgets pages and progress; their new owner has them already."""
        self.lock = None
        self._reset()

    def _count(self, pages: int, page_size: int) -> None:
        self.page_count = pages
        self.page_capacity = pages * page_size
        self.pages = self.table[:pages]
