"""Every error that cgmq_fx raises on purpose.

A message names the place, the value, the rule that was broken and the way out.
"""


class CgmqError(Exception):
    """Base of all errors that cgmq_fx raises on purpose."""


class BudgetError(CgmqError):
    """A budget is malformed, cannot be met at any allowed bit-width, or is not met."""


class CostTableError(CgmqError):
    """A cost table is malformed, ambiguous, or lacks a price that it must have."""


class UnsupportedModelError(CgmqError):
    """A model cannot be traced or transformed, or its inputs do not fit it."""


class TrainingError(CgmqError):
    """Guided training cannot go on, or was not done when its result is needed."""


class UsageError(CgmqError, ValueError):
    """A function was called with arguments, or at a moment, that make no sense."""


class PassError(CgmqError):
    """A graph pass broke its contract; the message is for the author of the pass."""
