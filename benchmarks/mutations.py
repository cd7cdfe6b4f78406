"""Changes of JSON values, as a forger of files would make them."""

import random
from typing import Any

#: What stands where a number stood.
NUMBERS = (0, -1, 1, 2**31, 2**40, 2**62, 2**63, 10**300, 0.5, True, None, "8", [], {}, "x" * 9999)
NAMES = ("../../etc/passwd", "/x", "a\\b", "", ".", "..", "a\n", "\x1b[2J", "__class__", "é")


def changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with something in it changed."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        match rng.randrange(12):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, rng.choice(NAMES): value[key]}
            case _:
                return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        match rng.randrange(10):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value, value[place]]
            case _:
                return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 7, -value, value))
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((*NAMES, value + "0", value[1:]))
    return rng.choice(NUMBERS)
