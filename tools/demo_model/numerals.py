"""Numbers in words."""

from __future__ import annotations

_SMALL = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = str.split("twenty thirty forty fifty sixty seventy eighty ninety")


def spell(number: int) -> str:
    """English words for 0..100; raises ValueError outside."""
    if not 0 <= number <= 100:
        raise ValueError(f"{number} is not in 0..100")
    if number < 20:
        return _SMALL[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")
