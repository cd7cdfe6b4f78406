"""Every error that cgmq_fx raises on purpose.

A message names the place, the value, the rule that was broken and the way out.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction


class CgmqError(Exception):
    """Base of all errors that cgmq_fx raises on purpose."""


class BudgetError(CgmqError):
    """A budget is malformed, cannot be met at any allowed bit-width, or is not met.

    Where no allowed bit-widths meet the budgets, the attributes say what would; else they are
    empty.

    Attributes:
        floors: the least that each resource with a budget can cost alone, in its unit.
        feasible: for every resource with a budget a figure, in its unit, such that all of them
            together are feasible; the budgets that need not be raised stand here as they were.
        suggestion: the budgets to raise, rounded up to readable figures, under the names that the
            caller gave them: ``{**budget, **error.suggestion}`` is feasible.
        unlocks: single changes of which each makes the budgets feasible as they are: keyword
            arguments for `prepare`.
    """

    def __init__(
        self,
        message: str = "",
        *,
        floors: Mapping[str, Fraction] | None = None,
        feasible: Mapping[str, Fraction] | None = None,
        suggestion: Mapping[str, str] | None = None,
        unlocks: Sequence[Mapping[str, object]] = (),
    ) -> None:
        super().__init__(message)
        self.floors = dict(floors or {})
        self.feasible = dict(feasible or {})
        self.suggestion = dict(suggestion or {})
        self.unlocks = tuple(dict(change) for change in unlocks)


class CostTableError(CgmqError):
    """A cost table is malformed, ambiguous, or lacks a price that it must have."""


class UnsupportedModelError(CgmqError):
    """A model cannot be traced or transformed, or its inputs do not fit it."""


class TrainingError(CgmqError):
    """Guided training cannot go on, or was not done when its result is needed."""


class UsageError(CgmqError, ValueError):
    """A function was called with arguments, or at a moment, that make no sense."""


class FileFormatError(CgmqError, ValueError):
    """A file of a model cannot be read, is damaged, or says what its own content contradicts."""


class PassError(CgmqError):
    """A graph pass broke its contract; the message is for the author of the pass."""
