"""The prefix tree of one engine: its longest prefixes, who uses them, what is pinned; and moving them elsewhere."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import work
from textual.binding import Binding, BindingType
from textual.markup import escape
from textual.widgets import Static

from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import MicroserveError
from microserve.tools.common import visible
from microserve.tools.moves import migrate
from microserve.tools.tui.dialogs import Ask, Choose
from microserve.tools.tui.live_table import LiveTable
from microserve.tools.tui.model import matches, nbytes
from microserve.tools.tui.pane import Pane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from textual.app import ComposeResult

    from microserve.runtime.async_client import AsyncClient
    from microserve.runtime.messages import FleetEngine, PrefixEntry
    from microserve.tools.tui.live_table import Cell

_COLUMNS = ("tokens>", "pages>", "used by>", "pinned", "begins … differs … ends with")
_COUNT = 40
_EVERY = 2.0
_ENDS = 24
"""Tokens at either end of a prefix that are shown as text."""
_SHARED = 16
"""Characters that are shown of a beginning which others share: what sets a prefix apart comes behind it."""
_TEXTS = 500
_TURN = Binding.Group("engine", compact=True)


class CachePane(Pane):
    """The longest prefixes, longest first."""

    title = "Cache"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left_square_bracket", "turn(-1)", "engine before", key_display="[", group=_TURN),
        Binding("right_square_bracket", "turn(1)", "engine after", key_display="]", group=_TURN),
        Binding("p", "pin", "pin"),
        Binding("u", "unpin", "unpin"),
        Binding("e", "evict", "evict"),
        Binding("E", "evict_all", "evict all"),
        Binding("m", "migrate", "migrate"),
    ]

    def __init__(self, client: AsyncClient, *, id: str) -> None:
        super().__init__(client, id=id)
        self.engine_id = ""
        self._prefixes: dict[str, PrefixEntry] = {}
        self._shared: dict[bytes, int] = {}
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._looked = -_EVERY
        self._trouble = ""
        self._which = Static("", id="which", classes="caption")
        self._table = LiveTable(id="prefixes")

    def compose(self) -> ComposeResult:
        yield self._which
        yield self._table

    def on_mount(self) -> None:
        self._table.set_columns(_COLUMNS)

    def focus_first(self) -> None:
        self._table.focus()

    @property
    def engine(self) -> FleetEngine | None:
        engines = self._engines()
        return next(
            (each for each in engines if each.info.engine_id == self.engine_id), engines[0] if engines else None
        )

    def _engines(self) -> list[FleetEngine]:
        return sorted(self.status.engines, key=lambda each: each.info.engine_id) if self.status is not None else []

    async def refresh_data(self, now: float) -> None:
        engine = self.engine
        if engine is None or now - self._looked < _EVERY:
            self._show_which()
            return
        self._looked = now
        name = engine.info.engine_id
        try:
            prefixes = await self.client.engine(name).cache_prefixes(_COUNT)
        except MicroserveError as error:
            self._trouble = error.message
            self._show_which()
            return
        model = engine.info.model.name
        shared = shared_bytes(entry.prompt for entry in prefixes)
        pieces = (piece for prompt, size in shared.items() for piece in pieces_of(prompt, size))
        await asyncio.gather(*(self._spell(piece, model) for piece in pieces))
        present = self.engine
        if present is not None and present.info.engine_id == name:
            self.engine_id, self._trouble = name, ""
            # No index: the cursor stays with a prefix when longer ones come.
            self._prefixes = {f"{hash(entry.prompt):x}": entry for entry in prefixes}
            self._shared = shared
            self.show()

    async def _spell(self, tokens: bytes, model: str) -> None:
        if tokens in self._texts:
            self._texts.move_to_end(tokens)
            return
        ids: list[int] = unpack_tokens(tokens).tolist()
        try:
            text = repr(await self.client.detokenize(ids, model=model))[1:-1]
        except MicroserveError:
            # A model without a tokenizer: ids are what there is.
            text = " ".join(map(str, ids))
        self._texts[tokens] = text
        while len(self._texts) > _TEXTS:
            self._texts.popitem(last=False)

    def show(self) -> None:
        rows: list[tuple[str, list[Cell]]] = []
        for key, entry in self._prefixes.items():
            shared = self._shared[entry.prompt]
            first, *rest = (self._texts.get(piece, "") for piece in pieces_of(entry.prompt, shared))
            text = " … ".join([first[:_SHARED] if shared else first, *rest])
            if matches(self.pattern, text):
                pinned = Text("pinned", "yellow") if entry.pinned else Text("")
                tokens = len(entry.prompt) // 4
                rows.append((key, [f"{tokens:,}", f"{entry.pages:,}", str(entry.references), pinned, text]))
        self._table.show(rows)
        self._show_which()

    def _show_which(self) -> None:
        present, engines = self.engine, self._engines()
        if present is None:
            self._which.update("no engines")
            return
        name, load = present.info.engine_id, present.load
        cached = f"   {load.cached_pages:,} of {load.total_pages:,} pages cached"
        line = "  ".join(each.info.engine_id for each in engines) + cached
        if self._trouble:
            cached = f"   [$text-error]{escape(visible(self._trouble))}[/]"
        if len(line) > self.app.size.width - 2:
            place = next(index for index, each in enumerate(engines, start=1) if each is present)
            self._which.update(f"[reverse]{escape(name)}[/reverse] {place} of {len(engines)}{cached}")
            return
        names = []
        for each in engines:
            shown = escape(each.info.engine_id)
            shown = f"[reverse]{shown}[/reverse]" if each is present else shown
            names.append(f"[@click=app.show_cache({each.info.engine_id!r})]{shown}[/]")
        self._which.update("  ".join(names) + cached)

    def choose(self, engine_id: str) -> None:
        """Shows another engine's tree."""
        self.engine_id = engine_id
        self._prefixes = {}
        self._trouble = ""
        self._looked = -_EVERY
        self.show()

    # --- actions -----------------------------------------------------------------------------------------------------

    def action_turn(self, step: int) -> None:
        names = [each.info.engine_id for each in self._engines()]
        present = self.engine
        if present is not None:
            self.choose(names[(names.index(present.info.engine_id) + step) % len(names)])

    def _chosen(self) -> tuple[str, list[int]] | None:
        """The engine and the prefix under the cursor."""
        key = self._table.selected
        engine = self.engine
        if key is None or engine is None or key not in self._prefixes:
            return None
        ids: list[int] = unpack_tokens(self._prefixes[key].prompt).tolist()
        return engine.info.engine_id, ids

    @work
    async def action_pin(self) -> None:
        chosen = self._chosen()
        if chosen is None:
            return
        name, ids = chosen
        answer = await self.app.push_screen_wait(
            Ask(f"Keep {len(ids):,} tokens on {name} for how many seconds?", "3600", "Pin", _ttl)
        )
        if answer is not None:
            self.act("pinned", lambda: self._counted(self.client.engine(name).cache_pin(ids, float(answer)), "tokens"))

    def action_unpin(self) -> None:
        chosen = self._chosen()
        if chosen is not None:
            name, ids = chosen
            self.act("unpinned", lambda: self._counted(self.client.engine(name).cache_unpin(ids), "tokens"))

    def action_evict(self) -> None:
        chosen = self._chosen()
        if chosen is not None:
            name, ids = chosen
            ask = f"Evict this prefix of {len(ids):,} tokens from {name}? Who needs it again computes it again."
            evict = self.client.engine(name).cache_evict
            self.act("evicted", lambda: self._counted(evict(ids), "pages"), ask=ask, yes="Evict")

    def action_evict_all(self) -> None:
        engine = self.engine
        if engine is not None:
            name = engine.info.engine_id
            ask = f"Evict all of {name}'s cache that is neither used nor pinned?"
            evict = self.client.engine(name).cache_evict
            self.act("evicted", lambda: self._counted(evict(), "pages"), ask=ask, yes="Evict all")

    @work
    async def action_migrate(self) -> None:
        chosen = self._chosen()
        if chosen is None:
            return
        name, ids = chosen
        others = [each.info.engine_id for each in self._engines() if each.info.engine_id != name]
        if not others:
            self.app.notify("there is no other engine", severity="warning")
            return
        target = await self.app.push_screen_wait(Choose(f"Move {len(ids):,} tokens from {name} to:", others))
        if target is None:
            return
        self.app.notify(f"moving {len(ids):,} tokens to {target} …", markup=False)

        async def move() -> str:
            moved = await migrate(self.client, name, target, ids)
            return f"{moved.tokens:,} tokens, {nbytes(moved.bytes)} in {moved.seconds:.2f} s"

        self.act(f"{name} → {target}", move)

    async def _counted(self, call: Awaitable[int], unit: str) -> str:
        count = await call
        self._looked = -_EVERY
        return f"{count:,} {unit}"


def shared_bytes(prompts: Iterable[bytes]) -> dict[bytes, int]:
    """Of each prompt, how many bytes it begins like the one of the others that is most like it; whole tokens."""
    found: dict[bytes, int] = {}
    # In their order those that begin alike are neighbours.
    ordered = sorted(set(prompts))
    before = 0
    for one, next_one in itertools.zip_longest(ordered, ordered[1:], fillvalue=b""):
        after = _alike(one, next_one)
        found[one] = max(before, after)
        before = after
    return found


def _alike(one: bytes, other: bytes) -> int:
    # By halves: prompts have hundreds of thousands of bytes, and comparing them whole is fast.
    low, high = 0, min(len(one), len(other)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[: 4 * middle] == other[: 4 * middle] else (low, middle - 1)
    return 4 * low


def pieces_of(prompt: bytes, shared: int) -> list[bytes]:
    """What is shown of a prompt as text: how it begins, where it parts from others, how it ends."""
    size = 4 * _ENDS
    # One that goes on in another prompt has its end alone.
    rest = prompt[shared:] or prompt[-size:]
    ends = [rest] if len(rest) <= 2 * size else [rest[:size], rest[-size:]]
    return [prompt[: min(shared, size)], *ends] if shared else ends


def _ttl(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return f"{text!r} is no number of seconds"
    return "" if 0 < value <= 31_536_000 else "seconds, above 0 and at most a year"
