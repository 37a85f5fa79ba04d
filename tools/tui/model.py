"""What the panes show, made of a router's answers: rates, bars, timelines. Knows no terminal and no clock."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from microserve.tools.fleet_view import duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from microserve.runtime.messages import FleetEngine, Load, PeerLink, RequestInfo, StatusReply, SubRequestInfo

_LEAST_RATE = 8
"""Columns in which a rate can be drawn."""

SAMPLES = 60
"""Measurements of a rate that are kept."""

STATE_STYLES = {
    "ready": "green",
    "running": "green",
    "ok": "dim",
    "queued": "yellow",
    "starting": "yellow",
    "draining": "yellow",
    "connecting": "yellow",
    "degraded": "red",
    "silent": "red",
    "lost": "red",
    "refused": "red",
}
_EVENT_STYLES = {
    "joined": "green",
    "connected": "green",
    "back": "green",
    "restarted": "yellow",
    "state": "yellow",
    "aborted": "yellow",
    "strategy": "cyan",
    "operator": "cyan",
    "peer": "blue",
    "left": "yellow",
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_POOL = (
    ("owned_pages", "█", "green"),
    ("leased_pages", "▓", "yellow"),
    ("quarantined_pages", "╳", "red"),
    ("cached_pages", "▒", "blue"),
)
"""States of pages, in the order of a bar; what is left is free. Told apart without colours, too."""

_VERB_STYLES = {
    "prep_recv": "yellow",
    "remote_send": "blue",
    "start_generate": "green",
    "commit": "cyan",
    "cache_match": "magenta",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What an engine did a second, lately; 0 until it was seen twice."""

    tokens: float = 0.0
    prefilled: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    """Bytes of KV."""


class EngineTrack:
    """One incarnation of one engine over time."""

    def __init__(self, epoch: int, load: Load, now: float) -> None:
        self.epoch = epoch
        self.rates = Rates()
        self.history: deque[float] = deque(maxlen=SAMPLES)
        """Tokens a second, oldest first."""
        self._seen = 0
        self._load = load
        self._at = now

    def minute(self, width: int) -> list[float]:
        """All of the history in at most `width` values: means of as many samples as it takes."""
        size = -(-SAMPLES // width)
        # Groups begin at multiples of their size, counted from the first sample: they must not flicker.
        first = self._seen - len(self.history)
        groups: dict[int, list[float]] = {}
        for index, value in enumerate(self.history, start=first):
            groups.setdefault(index // size, []).append(value)
        return [sum(group) / len(group) for group in groups.values()][-width:]

    def see(self, load: Load, now: float) -> None:
        """Another load of the same incarnation. Heartbeats come once a second: the same one again says nothing new."""
        seconds = now - self._at
        if seconds <= 0 or (load == self._load and seconds < 2.0):
            return
        before = self._load

        def rate(name: str) -> float:
            change: int = getattr(load, name) - getattr(before, name)
            return max(0, change) / seconds

        self.rates = Rates(
            rate("generated_tokens"), rate("prefilled_tokens"), rate("sent_bytes"), rate("received_bytes")
        )
        self.history.append(self.rates.tokens)
        self._seen += 1
        self._load, self._at = load, now


class FleetTrack:
    """The engines of a fleet over time, and the sum of their tokens."""

    def __init__(self) -> None:
        self._router: tuple[str, int] = ("", 0)
        self._tracks: dict[str, EngineTrack] = {}
        self.history: deque[float] = deque(maxlen=SAMPLES)

    def see(self, status: StatusReply, now: float) -> None:
        """What the router says now; `now` in seconds, from any monotonic clock. Another router begins anew."""
        if self._router != (status.router, status.epoch):
            self._router = (status.router, status.epoch)
            self._tracks.clear()
            self.history.clear()
        tracks = self._tracks
        for engine in status.engines:
            track = tracks.get(engine.info.engine_id)
            if track is None or track.epoch != engine.info.epoch:
                tracks[engine.info.engine_id] = EngineTrack(engine.info.epoch, engine.load, now)
            else:
                track.see(engine.load, now)
        known = {engine.info.engine_id for engine in status.engines}
        for gone in [name for name in tracks if name not in known]:
            del tracks[gone]
        self.history.append(self.tokens)

    def track(self, engine_id: str) -> EngineTrack:
        return self._tracks[engine_id]

    @property
    def tokens(self) -> float:
        """Tokens a second of the whole fleet."""
        return sum(track.rates.tokens for track in self._tracks.values())


class LinkTrack:
    """Transfers of one engine to its peers, between two looks at its links."""

    def __init__(self) -> None:
        self._engine: tuple[str, int] = ("", 0)
        self._before: dict[str, tuple[int, int]] = {}
        self._at = 0.0
        self.rates: dict[str, tuple[float, float]] = {}
        """Bytes a second by peer: sent, received."""

    def see(self, engine: tuple[str, int], links: Iterable[PeerLink], now: float) -> None:
        """`engine` is its id and epoch: of another one nothing is known yet."""
        seconds = now - self._at
        fresh = engine != self._engine
        after = {link.engine_id: (link.sent_bytes, link.received_bytes) for link in links}
        self.rates = {}
        for peer, (sent, received) in after.items():
            old = self._before.get(peer)
            known = old is not None and not fresh and seconds > 0
            if known and old is not None:
                self.rates[peer] = (max(0, sent - old[0]) / seconds, max(0, received - old[1]) / seconds)
            else:
                self.rates[peer] = (0.0, 0.0)
        self._engine, self._before, self._at = engine, after, now


# --- drawing -------------------------------------------------------------------------------------------------------


def fitting(parts: Sequence[str], width: int, between: str = " · ") -> str:
    """As many of the parts as `width` columns hold, and the first in any case."""
    line, *rest = parts
    for part in rest:
        if cell_len(longer := line + between + part) > width:
            break
        line = longer
    return line


def totals_line(status: StatusReply, width: int, rate: str) -> Text:
    """The fleet in one line that ends with `rate`, with room behind it to draw the rate: what is less wanted gives way,
    and what nothing else tells stays."""
    states = Counter(engine.state for engine in status.engines)
    engines = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    some = f"{states['ready']} of {len(status.engines)} ready"
    running, queued = f"{number(status.active_requests)} running", f"{number(status.queued_requests)} queued"
    requests = f"requests: {running}, {queued}"
    forms = (
        f"engines: {engines}   {requests}, {number(status.requests_total)} in all   ",
        f"{engines}   {requests}, {number(status.requests_total)} in all   ",
        f"{engines}   {requests}   ",
        f"{some}   {requests}   ",
        f"{some}   {running}, {queued}   ",
    )
    line = next((form for form in forms if cell_len(form + rate) + _LEAST_RATE <= width), forms[-1])
    return Text(line).append(rate, "bold")


def cut(text: str, room: int) -> str:
    """The two ends of a text that is wider than `room` columns: names often differ at their ends."""
    if cell_len(text) <= room:
        return text
    end = ""
    for char in reversed(text):
        if cell_len(char + end) > (room - 1) // 2:
            break
        end = char + end
    return f"{set_cell_size(text, room - 1 - cell_len(end))}…{end}"


def sparkline(values: Sequence[float], width: int, *, top: float = 0.0) -> str:
    """The last `width` values as blocks, the highest (or `top`) as a full one."""
    shown = list(values)[-width:]
    most = max([top, *shown])
    if most <= 0:
        return _BLOCKS[0] * len(shown)
    return "".join(_BLOCKS[min(7, int(8 * value / most))] for value in shown)


def pool_bar(load: Load, width: int) -> Text:
    """Pages by state. A state with any page at all has at least one cell: the largest one gives way."""
    bar = Text()
    if not load.total_pages:
        return bar.append("-" * width, "dim")
    counts: list[int] = [getattr(load, name) for name, _, _ in _POOL]
    cells = [max(1, round(width * count / load.total_pages)) if count else 0 for count in counts]
    while sum(cells) > width:
        cells[cells.index(max(cells))] -= 1
    for (_, block, style), count in zip(_POOL, cells, strict=True):
        bar.append(block * count, style)
    return bar.append("·" * (width - sum(cells)), "dim")


def pool_words(load: Load) -> str:
    """The same in numbers."""
    names = ("owned", "leased", "quarantined", "cached", "free")
    counts = (f"{getattr(load, name + '_pages'):,} {name}" for name in names)
    return f"{load.total_pages:,} pages: {', '.join(counts)}"


def state_text(state: str) -> Text:
    """A state in its colour. Codes of errors are red."""
    return Text(state, STATE_STYLES.get(state, "red"))


def event_style(kind: str) -> str:
    return _EVENT_STYLES.get(kind, "red")


def number(value: float) -> str:
    """At most four characters and a unit: 7, 7.3, 950, 1.2k, 35k, 1.2M."""
    if 0 < value < 10 and value != int(value):
        return f"{value:.1f}"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def nbytes(value: float) -> str:
    """Bytes in decimal units, as transfers are rated."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """A time as short as it can be read: "-", "850µs", "12ms", "1.23s", "95s"."""
    if value is None:
        return "-"
    if value < 0.001:
        return f"{value * 1e6:.0f}µs"
    if value < 1:
        return f"{value * 1e3:.3g}ms"
    return f"{value:.3g}s" if value < 100 else f"{value:.0f}s"


def matches(pattern: str, *fields: str) -> bool:
    """Whether every word of a filter is in one of the fields, in whatever case."""
    text = "\n".join(fields).lower()
    return all(word in text for word in pattern.lower().split())


# --- requests ------------------------------------------------------------------------------------------------------


def timeline(request: RequestInfo, width: int) -> list[Text]:
    """A request's sub-requests on one axis of time, a line each: engine, verb, bar, what it brought."""
    whole = max([request.ended or request.age, *(sub.ended or 0.0 for sub in request.sub_requests), 1e-6])
    names = max([6, *(len(sub.engine) for sub in request.sub_requests)])
    names = min(names, 16)
    axis = max(10, min(60, width - names - 16 - 40))
    head = Text()
    head.append(" " * (names + 16))
    head.append("0".ljust(axis - 8) + seconds(whole).rjust(8), "dim")
    lines = [head]
    for sub in request.sub_requests:
        line = Text()
        line.append(cut(sub.engine, names).ljust(names + 1))
        line.append(sub.verb.ljust(15), _VERB_STYLES.get(sub.verb, ""))
        end = whole if sub.ended is None else sub.ended
        first = min(axis - 1, int(axis * sub.started / whole))
        last = max(first + 1, min(axis, round(axis * end / whole)))
        line.append("·" * first, "dim")
        line.append(("█" if sub.ended is not None else "▓") * (last - first), _VERB_STYLES.get(sub.verb, ""))
        line.append("·" * (axis - last), "dim")
        line.append(f" {brought(sub)}")
        lines.append(line)
    if not request.sub_requests:
        lines.append(Text("nothing was asked of an engine yet", "dim"))
    if request.first_token is not None:
        mark = Text(" " * (names + 16))
        at = min(axis - 1, int(axis * request.first_token / whole))
        mark.append(" " * at + "▲", "bold")
        mark.append(f" first token at {seconds(request.first_token)}", "dim")
        lines.append(mark)
    return lines


def brought(sub: SubRequestInfo) -> str:
    """What a sub-request is about and has brought, in a few words."""
    words = [seconds((sub.ended - sub.started) if sub.ended is not None else None), f"[{sub.begin},{sub.end})"]
    for name in ("matched", "computed", "reused"):
        count: int = getattr(sub, name)
        if count:
            words.append(f"{name} {count:,}")
    if sub.bytes:
        words.append(nbytes(sub.bytes))
    if sub.ended is None:
        words.append("running")
    elif sub.outcome != "ok":
        words.append(sub.outcome)
    return " ".join(words)


def engine_words(engine: FleetEngine, now: float) -> list[str]:
    """Facts of an engine that a narrow table has no room for. `now` is Unix time, seconds."""
    info = engine.info
    labels = " ".join(f"{name}={value}" for name, value in sorted(info.labels.items())) or "none"
    uptime = max(0.0, now - info.started_at) if info.started_at else 0.0
    return [
        f"{info.engine_id}  epoch {info.epoch:x}  up {duration(uptime)}  {info.endpoint}  executor {info.executor}",
        f"model {info.model.name} ({info.layout.dtype}, context {info.model.max_context:,})  labels {labels}",
    ]
