"""Mixed-precision quantization of PyTorch models under a hard cost budget."""

from cgmq_fx import cost as cost
from cgmq_fx.budget import Budget as Budget
from cgmq_fx.calibrate import calibrate as calibrate
from cgmq_fx.checkpoint import resume as resume
from cgmq_fx.checkpoint import save_checkpoint as save_checkpoint
from cgmq_fx.correct_bias import correct_bias as correct_bias
from cgmq_fx.errors import BudgetError as BudgetError
from cgmq_fx.errors import CgmqError as CgmqError
from cgmq_fx.errors import CostTableError as CostTableError
from cgmq_fx.errors import FileFormatError as FileFormatError
from cgmq_fx.errors import PassError as PassError
from cgmq_fx.errors import TrainingError as TrainingError
from cgmq_fx.errors import UnsupportedModelError as UnsupportedModelError
from cgmq_fx.errors import UsageError as UsageError
from cgmq_fx.explain import explain as explain
from cgmq_fx.export import export as export
from cgmq_fx.fit import accuracy as accuracy
from cgmq_fx.fit import fit as fit
from cgmq_fx.guide import attach as attach
from cgmq_fx.ledger import ledger as ledger
from cgmq_fx.load_exported import load_exported as load_exported
from cgmq_fx.load_packed import load_packed as load_packed
from cgmq_fx.lower import lower as lower
from cgmq_fx.overrides import Override as Override
from cgmq_fx.pareto import pareto as pareto
from cgmq_fx.prepare import prepare as prepare
from cgmq_fx.quantize import quantize as quantize
from cgmq_fx.report import report as report
from cgmq_fx.round_weights import round_weights as round_weights
from cgmq_fx.solve import solve as solve
from cgmq_fx.unit_bits import UnitBits as UnitBits
from cgmq_fx.verify import verify as verify

__version__ = "0.1.0"
