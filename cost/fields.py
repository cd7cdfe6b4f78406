"""Readers of single fields; each notes its fault and returns a harmless value."""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction

from cgmq_fx.cost.faults import Faults, nearest
from cgmq_fx.errors import UsageError
from cgmq_fx.units import exact, parse_number, parse_unit

MAX_BIT_WIDTH = 64
FRACTION_PATTERN = "[0-9]{1,60}/0*[1-9][0-9]{0,59}"
_FRACTION = re.compile(FRACTION_PATTERN)
MAX_TEXT = 2000


def check_keys(
    raw: Mapping[str, object], known: Iterable[str], needed: Iterable[str], faults: Faults
) -> None:
    """Note the keys of `raw` that are not `known`, and the `needed` ones that are missing."""
    known = tuple(known)
    for key, value in raw.items():
        if key not in known:
            hint = "" if faults.are_many else nearest(key, known)
            faults.below(str(key)).add(f"unknown key{hint}; keys here: {', '.join(known)}", value)
    for key in needed:
        if key not in raw:
            faults.below(key).add("this key is missing; add it")


def read_text(value: object, faults: Faults, *, empty: bool = True) -> str:
    """Return a text of at most 2,000 characters."""
    if not isinstance(value, str):
        faults.add("must be a text in quotes", value)
        return ""
    if len(value) > MAX_TEXT:
        faults.add(f"is {len(value)} characters long; at most {MAX_TEXT}", value)
        return ""
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        faults.add("is no sound Unicode text: it holds half of a surrogate pair", value)
        return ""
    if not empty and not value.strip():
        faults.add("must not be empty", value)
    return value


def read_choice(value: object, options: tuple[str, ...], faults: Faults) -> str:
    """Return one of `options`."""
    if isinstance(value, str) and value in options:
        return value
    faults.add(f"must be one of {', '.join(options)}{nearest(value, options)}", value)
    return options[0]


def read_bit_width(value: object, faults: Faults) -> int:
    """Return a bit-width from 0 (pruned) to 64."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BIT_WIDTH:
        faults.add(f"must be a whole number of bits from 0 to {MAX_BIT_WIDTH}", value)
        return 8
    return value


def read_whole(value: object, most: int, faults: Faults) -> int:
    """Return a whole number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        faults.add(f"must be a whole number from 0 to {most}", value)
        return 0
    return value


def read_amount(value: object, faults: Faults) -> Fraction:
    """Return a number that is finite and not negative, exactly as written; ``"1/3"`` is one."""
    if isinstance(value, str) and _FRACTION.fullmatch(value):
        return Fraction(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, Fraction)):
        faults.add("must be a number, or a fraction such as '1/3'", value)
        return Fraction(0)
    try:
        number = exact(value)
    except UsageError as error:
        faults.add(f"must be a finite number: {error}", value)
        return Fraction(0)
    if number < 0:
        faults.add("must not be negative", value)
        return Fraction(0)
    return number


def read_uncertainty(value: object, faults: Faults) -> Fraction | None:
    """Return a relative error: a share such as 0.05 or ``"1/20"``, or a text such as ``5 %``."""
    if value is None:
        return None
    if not isinstance(value, str) or _FRACTION.fullmatch(value):
        return read_amount(value, faults)
    try:
        share = parse_number(value.replace("%", "", 1)) / 100 if "%" in value else Fraction(-1)
    except UsageError:
        share = Fraction(-1)
    if share < 0:
        faults.add("must be a share such as 0.05 or a text such as '5 %'", value)
        return None
    return share


def read_unit(value: object, faults: Faults) -> str:
    """Return the symbol of a known unit."""
    symbol = read_text(value, faults, empty=False)
    if symbol.strip():
        try:
            return parse_unit(symbol).symbol
        except UsageError as error:
            faults.add(str(error), value)
    return "BOP"


def read_mapping(value: object, faults: Faults) -> Mapping[str, object]:
    """Return a table with text keys."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return value
    faults.add("must be a table { key = value, ... }", value)
    return {}


def read_sequence(value: object, faults: Faults, limit: int) -> list[object]:
    """Return a list of 1 to `limit` items."""
    if not isinstance(value, (list, tuple)):
        faults.add("must be a list [ ... ]", value)
        return []
    if not 1 <= len(value) <= limit:
        faults.add(f"has {len(value)} items; it must have 1 to {limit}")
        return []
    return list(value)
