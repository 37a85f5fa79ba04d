"""`microserve cache`: what engines have cached, kept, freed and moved."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import FAKE, Cluster, daemon_environ
from tests.command_support import PROGRAM, Terminal, command, usage_error
from tests.tokenizer_zoo import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.client import Client

PAGE = 16
TEXT = "the cat sat on the mat, " * 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two engines of a model that has a tokenizer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"))
    args = (*FAKE[:-1], str(folder), "--model-name", "m")
    with Cluster(engines=2, engine_args=args) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Client:
    made = cluster.client()
    # Now: what it opens belongs to no test.
    made.models()
    return made


@pytest.fixture(autouse=True)
def _empty(client: Client) -> None:
    for name in ("e0", "e1"):
        client.engine(name).cache_evict()


def cached(client: Client, *, engine: str = "e0", text: str = TEXT) -> list[int]:
    """The tokens of a text that an engine has cached from now on."""
    ids = client.tokenize(text, model="m")
    client.engine(engine).generate(ids, max_tokens=1, ignore_eos=True)
    return ids


def spelled(ids: list[int]) -> str:
    return ",".join(map(str, ids))


def asked(cluster: Cluster, *arguments: str) -> Any:
    return command(cluster, "cache", *arguments, "--json").json


def test_match_by_text_by_file_and_by_ids(cluster: Cluster, client: Client, tmp_path: Any) -> None:
    ids = cached(client)
    whole = len(ids) // PAGE * PAGE
    expected = {"engine": "e0", "prompt_tokens": len(ids), "matched_tokens": whole}
    (tmp_path / "prompt.txt").write_text(TEXT)
    assert asked(cluster, "match", "e0", "--text", TEXT) == expected
    assert asked(cluster, "match", "e0", "--file", str(tmp_path / "prompt.txt")) == expected
    assert asked(cluster, "match", "e0", "--tokens", spelled(ids)) == expected
    other = client.tokenize(TEXT, model="m", add_special_tokens=False)
    if other != ids:
        shorter = asked(cluster, "match", "e0", "--text", TEXT, "--no-special-tokens")
        assert shorter["prompt_tokens"] == len(other)
    shown = command(cluster, "cache", "match", "e1", "--text", TEXT)
    assert (shown.code, shown.out) == (0, f"e1: 0 of {len(ids)} tokens are cached\n")


def test_the_list(cluster: Cluster, client: Client) -> None:
    assert command(cluster, "cache", "list", "e0").out == "nothing is cached\n"
    assert asked(cluster, "list", "e0") == []
    ids = cached(client)
    whole = len(ids) // PAGE * PAGE
    cached(client, text="zebra \x1b[31m " * 10)
    found = asked(cluster, "list", "e0")
    assert [set(each) for each in found] == [{"tokens", "pages", "references", "pinned", "prompt", "begins"}] * 2
    first = found[0]
    assert (first["tokens"], first["pages"], first["references"], first["pinned"]) == (whole, whole // PAGE, 0, False)
    assert first["prompt"] == ids[:whole]
    assert TEXT.startswith(first["begins"].removeprefix("<s>"))
    title, row, odd = command(cluster, "cache", "list", "e0").out.splitlines()
    assert title.split() == ["tokens", "pages", "references", "pinned", "begins", "with"]
    assert row.split()[:3] == [str(whole), str(whole // PAGE), "0"]
    assert r"zebra \x1b[31m zebra" in odd
    assert len(asked(cluster, "list", "e0", "--count", "1")) == 1


def test_pin_evict_unpin(cluster: Cluster, client: Client) -> None:
    ids = cached(client)
    whole = len(ids) // PAGE * PAGE
    pinned = asked(cluster, "pin", "e0", "--text", TEXT, "--ttl", "60")
    assert pinned == {"engine": "e0", "prompt_tokens": len(ids), "pinned_tokens": whole, "ttl": 60.0}
    assert [each["pinned"] for each in asked(cluster, "list", "e0")] == [True]
    assert asked(cluster, "evict", "e0", "--all", "--yes") == {"engine": "e0", "prompt_tokens": 0, "evicted_pages": 0}
    assert command(cluster, "cache", "unpin", "e0", "--text", TEXT).out == f"e0: {whole} tokens are pinned no longer\n"
    shown = command(cluster, "cache", "unpin", "e0", "--text", TEXT)
    assert (shown.code, shown.out, shown.err) == (1, "", "microserve cache: e0: nothing of that was pinned\n")
    shown = command(cluster, "cache", "evict", "e0", "--text", TEXT, "--yes")
    assert (shown.code, shown.out) == (0, f"e0: {whole // PAGE} pages freed\n")
    assert asked(cluster, "list", "e0") == []
    shown = command(cluster, "cache", "pin", "e0", "--text", TEXT)
    assert (shown.code, shown.err) == (1, "microserve cache: e0: nothing of that was cached\n")


def test_migrate(cluster: Cluster, client: Client) -> None:
    ids = cached(client)
    whole = len(ids) // PAGE * PAGE
    moved = asked(cluster, "migrate", "e0", "e1", "--text", TEXT)
    seconds, rate = moved.pop("seconds"), moved.pop("gigabytes_per_second")
    nbytes = moved.pop("bytes")
    assert moved == {"source": "e0", "target": "e1", "prompt_tokens": len(ids), "tokens": whole, "computed": 0}
    assert nbytes > 0
    assert rate == pytest.approx(nbytes / seconds / 1e9)
    assert asked(cluster, "match", "e1", "--tokens", spelled(ids))["matched_tokens"] == whole
    # Again: it is there.
    shown = command(cluster, "cache", "migrate", "e0", "e1", "--text", TEXT)
    assert (shown.code, shown.out) == (0, f"{whole} of {len(ids)} tokens are cached on e1 now\n")
    # What nobody had is computed where it comes from.
    shown = command(cluster, "cache", "migrate", "e1", "e0", "--tokens", spelled(list(range(100, 140))))
    assert shown.out.startswith("32 of 40 tokens are cached on e0 now; ")
    assert shown.out.endswith(", which computed 32 tokens for it\n")


def test_a_migration_that_fails_leaves_nothing(cluster: Cluster, client: Client) -> None:
    client.engine("e0").drain()
    try:
        shown = command(cluster, "cache", "migrate", "e0", "e1", "--tokens", spelled(list(range(1, 40))))
        assert (shown.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)
        assert "draining" in shown.err
    finally:
        client.engine("e0").resume()
    values = client.engine("e1").stats().values
    assert (values["lease_open"], values["cache_leased"]) == (0, 0)


def test_what_is_not_there_and_wrong_usage(cluster: Cluster) -> None:
    for words in (
        ("list", "e7"),
        ("match", "e7", "--text", "x"),
        ("match", "e7", "--tokens", "1"),
        ("evict", "e7", "--all", "--yes"),
        ("migrate", "e7", "e0", "--text", TEXT),
        ("migrate", "e0", "e7", "--text", TEXT),
    ):
        shown = command(cluster, "cache", *words)
        assert (shown.code, shown.out) == (1, ""), words
        assert shown.err == "microserve cache: there is no engine 'e7'; there are: e0, e1\n"
    shown = command(cluster, "cache", "migrate", "e0", "e1", "--tokens", "1,2")
    assert (shown.code, shown.err) == (1, "microserve cache: 2 tokens do not fill a page of 16: nothing to move\n")
    wrong: list[tuple[tuple[str, ...], str]] = [
        (("match", "e0"), "one of the arguments --text --file --tokens is required"),
        (("evict", "e0", "--yes"), "one of the arguments --text --file --tokens --all is required"),
        (("match", "e0", "--text", "a", "--tokens", "1"), "argument --tokens: not allowed with argument --text"),
        (("match", "e0", "--text", ""), "the prompt is empty"),
        (("match", "e0", "--file", "/none"), "--file /none: [Errno 2] No such file or directory: '/none'"),
        (("evict", "e0", "--all"), "there is nobody to ask: say --yes"),
        (("migrate", "e0", "e0", "--text", "a"), "FROM and TO are one engine"),
        (("match", "e0", "--tokens", "1,x"), "argument --tokens: token ids are whole numbers with commas between them"),
        (
            ("match", "e0", "--tokens", "1,-2"),
            "argument --tokens: token ids are at least 0 and below 2**31, and one at least is needed",
        ),
        (
            ("pin", "e0", "--text", "a", "--ttl", "0"),
            "argument --ttl: '0' is not a number of seconds above 0 and at most 31536000",
        ),
        (("list", "e0", "--count", "0"), "argument --count: '0' is not between 1 and 1000"),
        (("list",), "the following arguments are required: ENGINE"),
    ]
    for arguments, told in wrong:
        assert usage_error(cluster, "cache", *arguments) == told
    shown = command("tcp://127.0.0.1:1", "cache", "list", "e0")
    assert (shown.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)


def test_a_model_without_a_tokenizer() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        cluster.client().generate(list(range(1, 20)), max_tokens=1, ignore_eos=True)
        [found] = asked(cluster, "list", "e0")
        assert (found["tokens"], found["begins"]) == (16, None)
        _, row = command(cluster, "cache", "list", "e0").out.splitlines()
        assert row.split() == ["16", "1", "0", "ids", "1", "2", "3", "4", "5", "6", "7", "8", "…"]
        shown = command(cluster, "cache", "match", "e0", "--text", "x")
        assert (shown.code, shown.out) == (1, "")
        assert shown.err == "microserve cache: model 'tokens-only' has no tokenizer: give token ids instead of text\n"


def test_on_a_terminal_evicting_is_asked_for(cluster: Cluster, client: Client) -> None:
    cached(client)
    for keys, code, left in (("n\n", 1, 1), ("y\n", 0, 0)):
        with Terminal(cluster, "cache", "evict", "e0", "--all") as terminal:
            terminal.until("Evict everything that nobody uses from e0? Who needs it computes it. [y/N] ")
            terminal.type(keys)
            assert terminal.end() == code
        assert len(asked(cluster, "list", "e0")) == left


def test_a_prompt_through_a_pipe(cluster: Cluster, client: Client) -> None:
    ids = cached(client)
    done = subprocess.run(
        [*PROGRAM, "cache", "match", "e0", "--file", "-", "--router", cluster.router],
        input=TEXT, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=True,
    )  # fmt: skip
    assert done.stdout == f"e0: {len(ids) // PAGE * PAGE} of {len(ids)} tokens are cached\n"
