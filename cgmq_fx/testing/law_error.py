"""What a broken law says: which one, where, what was expected, and the case that shows it."""

from collections.abc import Iterable
from itertools import islice

MAX_FAULTS = 10


class LawError(AssertionError):
    """A law is broken.

    Attributes:
        law: its name, such as ``numerics``.
        faults: what breaks it, at most `MAX_FAULTS`.
    """

    def __init__(self, law: str, subject: str, faults: tuple[str, ...], source: str = "") -> None:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        case = f"\n\nThe case:\n{source}" if source else ""
        super().__init__(f"{subject} breaks the law '{law}':{listed}{case}")
        self.law, self.faults = law, faults


def require(law: str, subject: str, faults: Iterable[str], source: str = "") -> None:
    """Raise where there are faults.

    Args:
        law: name of the law.
        subject: what is held to it.
        faults: what breaks it; an error of cgmq_fx or torch on the way is its caller's matter.
        source: the case, as Python.

    Raises:
        LawError: there is a fault; the first `MAX_FAULTS` are listed.
    """
    found = tuple(islice(faults, MAX_FAULTS))
    if found:
        raise LawError(law, subject, found, source)
