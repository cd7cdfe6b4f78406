"""A kit for those who write graph transforms: Hypothesis strategies, and laws to check."""

try:
    import hypothesis as _hypothesis
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "cgmq_fx.testing draws its cases with Hypothesis, which is not installed: "
        "pip install 'cgmq-fx[testing]'",
        name="hypothesis",
    ) from error

from cgmq_fx.testing.budgets import bit_width_assignments as bit_width_assignments
from cgmq_fx.testing.budgets import budgets as budgets
from cgmq_fx.testing.case import Case as Case
from cgmq_fx.testing.check_cost_table import check_cost_table as check_cost_table
from cgmq_fx.testing.check_lowering import check_lowering as check_lowering
from cgmq_fx.testing.check_pass import check_pass as check_pass
from cgmq_fx.testing.check_prepare import check_prepare as check_prepare
from cgmq_fx.testing.cost_tables import cost_tables as cost_tables
from cgmq_fx.testing.law_error import LawError as LawError
from cgmq_fx.testing.strategies import exported_programs as exported_programs
from cgmq_fx.testing.strategies import graph_modules as graph_modules
from cgmq_fx.testing.strategies import models as models
from cgmq_fx.testing.traits import OPT_IN as OPT_IN
from cgmq_fx.testing.traits import TRAITS as TRAITS

del _hypothesis
