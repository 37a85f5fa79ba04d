"""The load generator: arrivals and lengths that are seeded, requests over HTTP, and the serving figures of each run.

Definitions (those of the field's benchmarks): TTFT is from sending to the first content chunk; TPOT is
(JCT - TTFT) / (output tokens - 1) per request; ITL is every gap between content chunks, pooled; JCT is from sending to
the last chunk. A failed request is reported, never dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_END = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload: when it arrives (seconds from the start) and its token counts."""

    at: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request saw, in seconds. `error` is empty for a request that completed with every token."""

    ttft: float
    jct: float
    output_tokens: int
    gaps: tuple[float, ...]
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds an output token after the first; 0 for a single token."""
        return (self.jct - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Times are seconds; `mean`, `p50`, `p99` by metric name."""

    completed: int
    failed: int
    duration: float
    request_rate: float
    output_rate: float
    input_rate: float
    goodput: float
    metrics: dict[str, dict[str, float]]


def sharegpt_like(count: int, *, rate: float, seed: int, vocab: int, longest: int, longest_output: int) -> list[Job]:
    """`count` jobs with Poisson arrivals at `rate` a second (0: all at once).

    Lengths are log-normal, after the shape of chat logs: prompt median 40 tokens with a long tail, output median 130;
    clipped to `longest` and `longest_output`. Ids are uniform over the vocabulary, so no two prompts share a prefix.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1.0 / rate, count) if rate > 0 else np.zeros(count)
    arrivals = np.cumsum(gaps) - (gaps[0] if count else 0.0)
    prompts = np.clip(random.lognormal(mean=np.log(40), sigma=1.3, size=count).astype(int), 4, longest)
    outputs = np.clip(random.lognormal(mean=np.log(130), sigma=0.9, size=count).astype(int), 2, longest_output)
    return [
        Job(float(at), tuple(random.integers(3, vocab, size=size).tolist()), int(output))
        for at, size, output in zip(arrivals, prompts, outputs, strict=True)
    ]


def fixed(count: int, *, rate: float, seed: int, vocab: int, prompt_tokens: int, output_tokens: int) -> list[Job]:
    """`count` jobs of one size, with Poisson arrivals at `rate` a second (0: all at once)."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(1.0 / rate, count) if rate > 0 else np.zeros(count)
    arrivals = np.cumsum(gaps) - (gaps[0] if count else 0.0)
    return [
        Job(float(at), tuple(random.integers(3, vocab, size=prompt_tokens).tolist()), output_tokens) for at in arrivals
    ]


def sharegpt_file(
    path: Path, *, count: int, rate: float, seed: int, tokenize: Callable[[str], Sequence[int]]
) -> list[Job]:
    """Jobs from a ShareGPT JSON file: first human turn as the prompt, the answer's token count as the output length."""
    random = np.random.default_rng(seed)
    conversations = [c["conversations"] for c in json.loads(path.read_text()) if len(c.get("conversations", ())) >= 2]
    if not conversations:
        raise SystemExit(f"{path}: no conversation of two turns or more in it")
    chosen = random.choice(len(conversations), size=count, replace=len(conversations) < count)
    gaps = random.exponential(1.0 / rate, count) if rate > 0 else np.zeros(count)
    jobs = []
    for at, index in zip(np.cumsum(gaps), chosen, strict=True):
        turns = conversations[int(index)]
        answer = max(2, len(tokenize(turns[1]["value"])))
        jobs.append(Job(float(at), tuple(tokenize(turns[0]["value"])), answer))
    return jobs


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None


async def run(url: str, model: str, jobs: Sequence[Job], *, timeout: float, api_key: str = "") -> list[Outcome]:
    """Sends every job at its time to `/v1/completions` at `url`, streaming; returns the outcomes in the jobs' order."""
    decoder = msgspec.json.Decoder(_Event)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout, headers=headers) as client:
        started = time.perf_counter()

        async def one(job: Job) -> Outcome:
            await asyncio.sleep(max(0.0, job.at - (time.perf_counter() - started)))
            return await _request(client, model, job, decoder)

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def _request(client: httpx.AsyncClient, model: str, job: Job, decoder: msgspec.json.Decoder[_Event]) -> Outcome:
    body = {
        "model": model,
        "prompt": list(job.prompt),
        "max_tokens": job.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    stamps: list[float] = []
    tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return _failed(sent, stamps, f"HTTP {response.status_code}: {text[:200]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                data = line[6:].encode()
                if data == _END:
                    break
                event = decoder.decode(data)
                if event.error is not None:
                    return _failed(sent, stamps, str(event.error))
                if event.usage is not None:
                    tokens = event.usage.completion_tokens
                if event.choices and (event.choices[0].text or event.choices[0].finish_reason is None):
                    stamps.append(time.perf_counter())
    except httpx.HTTPError as error:
        return _failed(sent, stamps, f"{type(error).__name__}: {error}")
    if tokens != job.output_tokens or not stamps:
        return _failed(sent, stamps, f"{tokens} tokens instead of {job.output_tokens}")
    gaps = tuple(b - a for a, b in itertools.pairwise(stamps))
    return Outcome(stamps[0] - sent, stamps[-1] - sent, tokens, gaps)


def _failed(sent: float, stamps: Sequence[float], error: str) -> Outcome:
    last = stamps[-1] if stamps else time.perf_counter()
    return Outcome((stamps[0] if stamps else last) - sent, last - sent, len(stamps), (), error)


def summarize(jobs: Sequence[Job], outcomes: Sequence[Outcome], *, slo_ttft: float, slo_tpot: float) -> Summary:
    """The figures of a run. Goodput counts completed requests a second that met both objectives (seconds)."""
    done = [outcome for outcome in outcomes if not outcome.error]
    ends = [job.at + outcome.jct for job, outcome in zip(jobs, outcomes, strict=True)]
    duration = max(ends, default=0.0)
    series: dict[str, list[float]] = {
        "TTFT": [o.ttft for o in done],
        "TPOT": [o.tpot for o in done if o.output_tokens > 1],
        "ITL": [gap for o in done for gap in o.gaps],
        "JCT": [o.jct for o in done],
    }
    metrics = {
        name: {
            "mean": float(np.mean(values)),
            "p50": float(np.percentile(values, 50)),
            "p99": float(np.percentile(values, 99)),
        }
        for name, values in series.items()
        if values
    }
    good = sum(1 for o in done if o.ttft <= slo_ttft and o.tpot <= slo_tpot)
    per_second = 1.0 / duration if duration else 0.0
    return Summary(
        completed=len(done),
        failed=len(outcomes) - len(done),
        duration=duration,
        request_rate=len(done) * per_second,
        output_rate=sum(o.output_tokens for o in done) * per_second,
        input_rate=sum(len(j.prompt) for j, o in zip(jobs, outcomes, strict=True) if not o.error) * per_second,
        goodput=good * per_second,
        metrics=metrics,
    )
