"""How the prefill budget of a step is shared, so that no prompt, long or short, keeps others from progressing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from microserve.engine.request import Request

PATIENCE = 8
"""Steps that an admitted prompt may go without progress; then it is served before all others."""


def share(prefilling: Collection[Request], budget: int, step: int, chunk: int | None = None) -> dict[int, int]:
    """Tokens of this step for each prefilling request, by its id; at most `budget` together, at most `chunk` each.

    In this order: whoever has waited for `PATIENCE` steps gets a quarter (the longest wait alone, so that waiting is
    bounded by PATIENCE plus the number of prefilling requests); the oldest gets half of what is left, so that a long
    prompt always moves; the shortest remainders get the rest, so that short prompts do not wait for long ones; what
    they do not need goes to the oldest.
    """
    if not prefilling or budget <= 0:
        return {}
    given: dict[int, int] = {}

    def give(request: Request, most: int) -> None:
        nonlocal budget
        have = given.get(request.id, 0)
        wanted = request.remaining if chunk is None else min(request.remaining, chunk)
        if (more := min(wanted - have, most, budget)) > 0:
            given[request.id] = have + more
            budget -= more

    oldest = min(prefilling, key=lambda request: request.id)
    if len(prefilling) > 1:
        patient = min(prefilling, key=lambda request: (request.progressed, request.id))
        if step - patient.progressed >= PATIENCE:
            give(patient, max(1, budget // 4))
        give(oldest, max(1, budget // 2))
        for request in sorted(prefilling, key=lambda request: (request.remaining, request.id)):
            if budget == 0:
                break
            if request is not oldest:
                give(request, budget)
    give(oldest, budget)
    return given
