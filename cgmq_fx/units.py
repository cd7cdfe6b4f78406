"""Units of cost: read an amount such as ``64 KiB``, convert it exactly, write it for people.

Amounts are fractions in the base unit of their dimension, so nothing is ever rounded but what is
printed. SI prefixes are powers of 1000, binary prefixes (``Ki``, ``Mi``) powers of 1024.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

from cgmq_fx.errors import UsageError

#: Largest power of ten that a number may carry: beyond it stands a typing error, not a cost.
MAX_EXPONENT = 60
_MAX_DIGITS = 60

_LARGE = {"k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_SMALL = {"m": -3, "u": -6, "n": -9, "p": -12, "f": -15}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4}
_PLURALS = ("BOPs", "MACs", "cycles", "bytes", "bits")
_NUMBER = r"[+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_AMOUNT = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<unit>[^\d\s].*?)?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of one dimension.

    Attributes:
        symbol: how it is written, such as ``KiB``.
        dimension: its base unit, one of ``BOP``, ``MAC``, ``byte``, ``cycle``, ``s``, ``J``.
        scale: base units in one of this unit.
    """

    symbol: str
    dimension: str
    scale: Fraction


def _prefixed(symbol: str, dimension: str, prefixes: Mapping[str, int]) -> Iterator[Unit]:
    for prefix, power in prefixes.items():
        yield Unit(prefix + symbol, dimension, Fraction(10) ** power)


def _known_units() -> Iterator[Unit]:
    for base in ("BOP", "MAC", "cycle"):
        yield Unit(base, base, Fraction(1))
        yield from _prefixed(base, base, _LARGE)
    for symbol, scale in (("byte", Fraction(1)), ("B", Fraction(1)), ("bit", Fraction(1, 8))):
        yield Unit(symbol, "byte", scale)
        if symbol == "byte":
            continue
        for prefix, power in _LARGE.items():
            yield Unit(prefix + symbol, "byte", scale * 10**power)
        for prefix, power in _BINARY.items():
            yield Unit(prefix + symbol, "byte", scale * 1024**power)
    for base in ("s", "J"):
        yield Unit(base, base, Fraction(1))
        yield from _prefixed(base, base, _SMALL)
    yield from _prefixed("J", "J", {"k": 3, "M": 6})


#: Every unit by its symbol.
UNITS: Mapping[str, Unit] = MappingProxyType({unit.symbol: unit for unit in _known_units()})

#: What each dimension measures, for messages.
DIMENSIONS: Mapping[str, str] = MappingProxyType(
    {
        "BOP": "bit operations",
        "MAC": "multiply-accumulates",
        "byte": "memory",
        "cycle": "clock cycles",
        "s": "time",
        "J": "energy",
    }
)

# Symbols tried, largest first, when an amount is written for people.
_DISPLAY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **{base: tuple(f"{p}{base}" for p in "PTGMk") for base in ("BOP", "MAC", "cycle")},
        "byte": ("TiB", "GiB", "MiB", "KiB"),
        "s": ("s", "ms", "us", "ns", "ps", "fs"),
        "J": ("MJ", "kJ", "J", "mJ", "uJ", "nJ", "pJ", "fJ"),
    }
)


def known_units() -> str:
    """Return the most used unit symbols, for messages."""
    return (
        "BOP, kBOP, MBOP, GBOP, MAC, MMAC, B, KiB, MiB, kB, MB, bit, cycle, Mcycle, "
        "s, ms, us, ns, J, mJ, uJ, nJ, pJ"
    )


def parse_unit(text: str) -> Unit:
    """Return the unit that `text` names.

    Plurals (``BOPs``, ``cycles``, ``bytes``) and the micro signs are understood.

    Raises:
        UsageError: no such unit; the message has the nearest one.

    >>> parse_unit("KiB").scale
    Fraction(1024, 1)
    """
    symbol = text.strip().replace("\N{MICRO SIGN}", "u").replace("\N{GREEK SMALL LETTER MU}", "u")
    if symbol.endswith(_PLURALS):
        symbol = symbol[:-1]
    if symbol in UNITS:
        return UNITS[symbol]
    raise UsageError(f"unknown unit {text!r}{_nearest(symbol)}; units: {known_units()}")


def _nearest(symbol: str) -> str:
    same = [known for known in UNITS if known.lower() == symbol.lower()]
    if symbol == "KB":
        same = ["kB", "KiB"]
    found = same or difflib.get_close_matches(symbol, UNITS, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(unit) for unit in found)}?)" if found else ""


def is_number(text: str) -> bool:
    """Tell whether `text` is a decimal number and nothing else."""
    return re.fullmatch(rf"\s*{_NUMBER}\s*", text, re.ASCII) is not None


def parse_number(text: str) -> Fraction:
    """Return the exact value of a decimal number such as ``1.5e6``.

    Raises:
        UsageError: not a finite decimal number, or one of absurd size.
    """
    if not is_number(text):
        raise UsageError(f"{text!r} is not a decimal number such as 12 or 1.5e6")
    return exact(Decimal(text.strip().replace("_", "")))


def exact(number: int | float | Decimal | Fraction) -> Fraction:
    """Return the fraction that a person meant by `number`: 0.1 is one tenth.

    Raises:
        UsageError: NaN, infinite, or of absurd size.
    """
    if isinstance(number, Fraction):
        return number
    decimal = Decimal(repr(float(number))) if isinstance(number, float) else number
    if isinstance(decimal, int):
        if decimal.bit_length() > 3 * MAX_EXPONENT:
            raise UsageError(f"the number is beyond 1e{MAX_EXPONENT}")
        return Fraction(decimal)
    if not decimal.is_finite():
        raise UsageError(f"{number} is not a finite number")
    too_long = len(decimal.as_tuple().digits) > _MAX_DIGITS
    if too_long or (decimal != 0 and abs(decimal.adjusted()) > MAX_EXPONENT):
        raise UsageError(f"the number has over {_MAX_DIGITS} digits or is beyond 1e{MAX_EXPONENT}")
    if decimal == 0:
        return Fraction(0)
    return Fraction(decimal)


def parse_amount(text: str) -> tuple[Fraction, Unit]:
    """Return the number and the unit of an amount such as ``64 KiB``; the number counts that unit.

    Raises:
        UsageError: no number, no unit, or an unknown unit.

    >>> number, unit = parse_amount("64 KiB")
    >>> number * unit.scale, unit.dimension
    (Fraction(65536, 1), 'byte')
    """
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not an amount such as '12 MBOP' or '64 KiB'")
    if match["unit"] is None:
        raise UsageError(f"{text!r} has no unit; write it as in '12 MBOP' or '64 KiB'")
    return parse_number(match["number"]), parse_unit(match["unit"])


def convert(amount: Fraction, unit: str, to: str) -> Fraction:
    """Return `amount` of `unit` counted in `to`, exactly.

    Raises:
        UsageError: the two units measure different things.

    >>> convert(Fraction(3), "ms", "us")
    Fraction(3000, 1)
    """
    source, target = parse_unit(unit), parse_unit(to)
    if source.dimension != target.dimension:
        raise UsageError(
            f"{unit!r} measures {DIMENSIONS[source.dimension]}, "
            f"{to!r} measures {DIMENSIONS[target.dimension]}"
        )
    return amount * source.scale / target.scale


def format_number(number: Fraction, digits: int = 4) -> str:
    """Return `number` with at most `digits` significant digits, in full up to a million.

    >>> format_number(Fraction(65536, 3))
    '21,845'
    >>> format_number(Fraction(1, 3))
    '0.3333'
    """
    if number == 0:
        return "0"
    whole = abs(number)
    if whole >= 10 ** (digits - 1):
        return f"{round(number):,}" if whole < 10**15 else f"{float(number):.{digits - 1}e}"
    text = f"{float(number):.{digits}g}"
    if "e" in text:
        return text
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_amount(amount: Fraction, unit: str, digits: int = 4) -> str:
    """Return `amount` of `unit` with the prefix that reads best.

    >>> format_amount(Fraction(2184000), "BOP")
    '2.184 MBOP'
    >>> format_amount(Fraction(65536), "byte")
    '64 KiB'
    """
    parsed = parse_unit(unit)
    base = amount * parsed.scale
    symbols = _DISPLAY[parsed.dimension]
    for symbol in symbols:
        if abs(base) >= UNITS[symbol].scale:
            return f"{format_number(base / UNITS[symbol].scale, digits)} {symbol}"
    smallest = (
        parsed.dimension if amount == 0 or parsed.dimension not in ("s", "J") else symbols[-1]
    )
    return f"{format_number(base / UNITS[smallest].scale, digits)} {smallest}"


def amount_at_least(amount: Fraction, unit: str, digits: int = 6) -> str:
    """Return an amount that is never below `amount`, with `digits` digits, as `parse_amount` reads.

    >>> amount_at_least(Fraction(65537), "byte", 4)
    '64.01 KiB'
    """
    parsed = parse_unit(unit)
    base = amount * parsed.scale
    symbol = format_amount(amount, unit).rpartition(" ")[2]
    return f"{number_at_least(base / UNITS[symbol].scale, digits)} {symbol}"


def number_at_least(number: Fraction, digits: int) -> str:
    """Return a decimal number that is never below `number`, which is not negative, in `digits`.

    >>> number_at_least(Fraction(1, 3), 4)
    '0.3334'
    """
    decimals = digits - len(str(int(number))) if number >= 1 else digits
    while 0 < number * 10**decimals < 10 ** (digits - 1):
        decimals += 1
    decimals = max(0, decimals)
    scaled = -(-number.numerator * 10**decimals // number.denominator)
    whole, part = divmod(scaled, 10**decimals)
    text = f"{whole}.{part:0{decimals}d}" if decimals else str(whole)
    return text.rstrip("0").rstrip(".") if "." in text else text
