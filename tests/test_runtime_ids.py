"""Ids: names that may name a process, incarnations that grow, ids that never repeat."""

from __future__ import annotations

import pytest

from microserve.runtime.ids import IdSource, Peer, new_epoch, valid_name


@pytest.mark.parametrize("name", ["a", "engine-1", "A.b_c-9", "0", "x" * 63])
def test_good_names(name: str) -> None:
    assert valid_name(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "_a", "a b", "a:b", "a#1", "ü", "x" * 64, "a\n"])
def test_bad_names(name: str) -> None:
    assert not valid_name(name)


def test_a_peer_shows_its_incarnation() -> None:
    peer = Peer("engine", "a", 255)
    assert str(peer) == "engine:a:ff"
    assert peer.routing_id == b"engine:a:ff"
    assert peer == Peer("engine", "a", 255)
    assert peer != Peer("engine", "a", 256)
    assert len({peer, Peer("engine", "a", 255)}) == 1


def test_the_longest_routing_id_fits_what_zeromq_takes() -> None:
    assert len(Peer("k" * 63, "n" * 63, new_epoch()).routing_id) < 200


def test_epochs_grow() -> None:
    first = new_epoch()
    while (second := new_epoch()) == first:
        pass
    assert second > first


def test_ids_are_unique_within_and_across_sources() -> None:
    one, two = IdSource("req"), IdSource("req")
    ids = [one.next() for _ in range(1000)] + [two.next() for _ in range(1000)]
    assert len(set(ids)) == 2000
    assert all(id.startswith("req-") for id in ids)
