"""Who may import whom, and a check of the source tree against it.

Imports point down only. Each group names the groups below it, and what it may take from outside.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from source_tree import PACKAGE_OF_FOLDER, module_files

# The group of a module is that of the longest of these names that contains it; `cgmq_fx` contains
# nothing but itself, because its folder holds both the bottom and the top of the house.
GROUP_OF = {
    "cgmq_fx": "front",
    "cgmq_fx.errors": "values",
    "cgmq_fx.units": "values",
    "cgmq_fx.budget": "values",
    "cgmq_fx.collector": "values",
    "cgmq_fx.cost": "cost",
    "cgmq_fx.fake_quantize": "quantizers",
    "cgmq_fx.native_fake_quantize": "quantizers",
    "cgmq_fx.native_library": "quantizers",
    "cgmq_fx.native_units": "quantizers",
    "cgmq_fx.gates": "quantizers",
    "cgmq_fx.quantizer_spec": "quantizers",
    "cgmq_fx.calibration": "quantizers",
    "cgmq_fx.quantizer": "quantizers",
    "cgmq_fx.unit_bits": "quantizers",
    "cgmq_fx.unit_quantizer": "quantizers",
    "cgmq_fx.fake_quantize_units": "quantizers",
    "cgmq_fx.quantizers": "quantizers",
    "cgmq_fx.attention": "quantizers",
    "cgmq_fx.quantizer_memory": "quantizers",
    "cgmq_fx.overrides": "quantizers",
    "cgmq_fx.selectors": "quantizers",
    "cgmq_fx.frozen": "quantizers",
    "cgmq_fx.packed_codes": "quantizers",
    "cgmq_fx.packing": "quantizers",
    "cgmq_fx.recurrence": "quantizers",
    "cgmq_fx.rectified": "quantizers",
    "cgmq_fx.recurrent": "quantizers",
    "cgmq_fx.state_quantizer": "quantizers",
    "cgmq_fx.standard_modules": "quantizers",
    "cgmq_fx.xnnpack_modules": "quantizers",
    "cgmq_fx.passes": "passes",
    "cgmq_fx.accounting": "workflow",
    "cgmq_fx.integer_products": "workflow",
    "cgmq_fx.integer_reference": "workflow",
    "cgmq_fx.allocate": "workflow",
    "cgmq_fx.choose_bits": "workflow",
    "cgmq_fx.ladders": "workflow",
    "cgmq_fx.sensitivity": "workflow",
    "cgmq_fx.tally": "workflow",
    "cgmq_fx.account": "workflow",
    "cgmq_fx.explain": "workflow",
    "cgmq_fx.explain_budget": "workflow",
    "cgmq_fx.explain_contents": "workflow",
    "cgmq_fx.explain_drawing": "workflow",
    "cgmq_fx.explain_text": "workflow",
    "cgmq_fx.budget_changes": "workflow",
    "cgmq_fx.ledger": "workflow",
    "cgmq_fx.ledger_text": "workflow",
    "cgmq_fx.ledger_contents": "workflow",
    "cgmq_fx.cli_tables": "workflow",
    "cgmq_fx.cli_measure": "workflow",
    "cgmq_fx.cli_arguments": "workflow",
    "cgmq_fx.table_diff": "workflow",
    "cgmq_fx.measure": "workflow",
    "cgmq_fx.price_model": "workflow",
    "cgmq_fx.compiled_call": "workflow",
    "cgmq_fx.prepared": "workflow",
    "cgmq_fx.prepare": "workflow",
    "cgmq_fx.choices": "workflow",
    "cgmq_fx.quantize_graph": "workflow",
    "cgmq_fx.plan": "workflow",
    "cgmq_fx.front_end": "workflow",
    "cgmq_fx.guide": "workflow",
    "cgmq_fx.step_statistics": "workflow",
    "cgmq_fx.ranks": "workflow",
    "cgmq_fx.undecayed": "workflow",
    "cgmq_fx.wrapped": "workflow",
    "cgmq_fx.integrations": "integrations",
    "cgmq_fx.directions": "workflow",
    "cgmq_fx.fit": "workflow",
    "cgmq_fx.plain_data": "workflow",
    "cgmq_fx.checkpoint": "workflow",
    "cgmq_fx.carried_state": "workflow",
    "cgmq_fx.checkpoint_file": "workflow",
    "cgmq_fx.input_shapes": "workflow",
    "cgmq_fx.identity": "workflow",
    "cgmq_fx.random_state": "workflow",
    "cgmq_fx.model_state": "workflow",
    "cgmq_fx.optimizer_state": "workflow",
    "cgmq_fx.training_state": "workflow",
    "cgmq_fx.epoch": "workflow",
    "cgmq_fx.fit_checkpoint": "workflow",
    "cgmq_fx.lower": "workflow",
    "cgmq_fx.lowered": "workflow",
    "cgmq_fx.report": "workflow",
    "cgmq_fx.report_contents": "workflow",
    "cgmq_fx.report_files": "workflow",
    "cgmq_fx.report_text": "workflow",
    "cgmq_fx.table_text": "workflow",
    "cgmq_fx.cli_verify": "workflow",
    "cgmq_fx.container": "workflow",
    "cgmq_fx.export": "workflow",
    "cgmq_fx.export_packed": "workflow",
    "cgmq_fx.export_program": "workflow",
    "cgmq_fx.export_pte": "workflow",
    "cgmq_fx.executorch_program": "workflow",
    "cgmq_fx.flatbuffer": "workflow",
    "cgmq_fx.pte_reader": "workflow",
    "cgmq_fx.pte_places": "workflow",
    "cgmq_fx.pte_finder": "workflow",
    "cgmq_fx.pte_levels": "workflow",
    "cgmq_fx.pte_activations": "workflow",
    "cgmq_fx.pte_grids": "workflow",
    "cgmq_fx.pte_file": "workflow",
    "cgmq_fx.xnnpack_reader": "workflow",
    "cgmq_fx.program_file": "workflow",
    "cgmq_fx.program_grids": "workflow",
    "cgmq_fx.program_json": "workflow",
    "cgmq_fx.standard_program": "workflow",
    "cgmq_fx.zip_records": "workflow",
    "cgmq_fx.load_exported": "workflow",
    "cgmq_fx.load_packed": "workflow",
    "cgmq_fx.manifest": "workflow",
    "cgmq_fx.manifest_json": "workflow",
    "cgmq_fx.packed_file": "workflow",
    "cgmq_fx.stored_file": "workflow",
    "cgmq_fx.open_stored": "workflow",
    "cgmq_fx.marked_graph": "workflow",
    "cgmq_fx.pools": "workflow",
    "cgmq_fx.protobuf": "workflow",
    "cgmq_fx.onnx_carriers": "workflow",
    "cgmq_fx.onnx_program": "workflow",
    "cgmq_fx.onnx_graph": "workflow",
    "cgmq_fx.onnx_qdq": "workflow",
    "cgmq_fx.onnx_qonnx": "workflow",
    "cgmq_fx.onnx_reader": "workflow",
    "cgmq_fx.onnx_grids": "workflow",
    "cgmq_fx.qdq_grids": "workflow",
    "cgmq_fx.qonnx_grids": "workflow",
    "cgmq_fx.onnx_file": "workflow",
    "cgmq_fx.onnx_marks": "workflow",
    "cgmq_fx.onnx_clips": "workflow",
    "cgmq_fx.onnx_split_bias": "workflow",
    "cgmq_fx.calibration_data": "workflow",
    "cgmq_fx.calibrate": "workflow",
    "cgmq_fx.measured_loss": "workflow",
    "cgmq_fx.allocate_exactly": "workflow",
    "cgmq_fx.solve": "workflow",
    "cgmq_fx.layer_values": "workflow",
    "cgmq_fx.round_weights": "workflow",
    "cgmq_fx.correct_bias": "workflow",
    "cgmq_fx.quantize": "workflow",
    "cgmq_fx.pareto": "workflow",
    "cgmq_fx.observers": "quantizers",
    "cgmq_fx.onnx_float_products": "workflow",
    "cgmq_fx.export_onnx": "workflow",
    "cgmq_fx.verify": "workflow",
    "cgmq_fx.verify_bounds": "workflow",
    "cgmq_fx.verify_work": "workflow",
    "cgmq_fx.demo_data": "workflow",
    "cgmq_fx.demo_output": "workflow",
    "cgmq_fx.cli": "workflow",
    "cgmq_fx.demo": "workflow",
    "cgmq_fx.testing": "testing",
}
MAY_IMPORT = {
    "values": {"values"},
    "cost": {"cost", "values"},
    "quantizers": {"quantizers", "values"},
    "passes": {"passes", "cost", "quantizers", "values"},
    "workflow": {"workflow", "passes", "cost", "quantizers", "values"},
    "front": {"workflow", "passes", "cost", "quantizers", "values"},
    "integrations": {"integrations", "workflow", "passes", "cost", "quantizers", "values"},
    "testing": {"testing", "workflow", "passes", "cost", "quantizers", "values"},
}
# What the lower groups may take from outside the standard library; the others take what they need.
THIRD_PARTY = {"values": set(), "cost": set(), "quantizers": {"torch"}}
# Vectorised totals are tensors; files are packed without torch.
THIRD_PARTY_OF_MODULE = {
    "cgmq_fx.packing": {"numpy"},
    "cgmq_fx.unit_bits": {"numpy"},
    "cgmq_fx.cost.totals": {"torch"},
    "cgmq_fx.cost.peak_memory": {"torch"},
}
WITHOUT_FX = {"values", "cost", "quantizers"}


@dataclass(frozen=True)
class Import:
    """One import: the dotted name it asks for (with leading dots if relative) and where."""

    target: str
    line: int


def violations(root: Path) -> list[str]:
    """Return one line for every import below `root` that breaks a rule; empty when all is well."""
    files = module_files(root)
    imports = {name: list(_imports(file, set(files))) for name, file in files.items()}
    found = [f"{name}: no group in GROUP_OF" for name in files if _group(name) is None]
    for name, targets in imports.items():
        for item in targets:
            if rule := _broken_rule(name, item.target):
                place = f"{files[name].relative_to(root)}:{item.line}"
                found.append(f"{place}: imports {item.target}: {rule}")
    return found + _cycles(imports)


def _imports(file: Path, modules: set[str]) -> Iterator[Import]:
    """Yield the imports of a file, at any depth, as the most specific module that each names."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                inside = base.partition(".")[0] in PACKAGE_OF_FOLDER
                yield Import(base if inside and full not in modules else full, node.lineno)


def _group(name: str) -> str | None:
    """Return the group of a module of the library, None when GROUP_OF does not cover it."""
    if name in GROUP_OF:
        return GROUP_OF[name]
    parent = name.rpartition(".")[0]
    return _group(parent) if parent not in {"", "cgmq_fx"} else None


def _broken_rule(name: str, target: str) -> str | None:
    top = target.partition(".")[0]
    if not top:
        return "imports are absolute"
    if top in PACKAGE_OF_FOLDER and top != "cgmq_fx":
        return f"its name is cgmq_fx.{top}"
    if target == "cgmq_fx":
        return "import the defining module, not the front"
    group = _group(name)
    if group is None:
        return None  # reported once, for the module itself
    if top == "cgmq_fx":
        return _broken_inner_rule(group, target)
    return _broken_outer_rule(name, group, target)


def _broken_inner_rule(group: str, target: str) -> str | None:
    target_group = _group(target)
    if target_group is None:
        return "no group in GROUP_OF"
    if target_group not in MAY_IMPORT[group]:
        return f"{group} may import {', '.join(sorted(MAY_IMPORT[group]))}, not {target_group}"
    return None


def _broken_outer_rule(name: str, group: str, target: str) -> str | None:
    top = target.partition(".")[0]
    if group in WITHOUT_FX and f"{target}.".startswith("torch.fx."):
        return f"{group} knows nothing of torch.fx"
    if group not in THIRD_PARTY or top in sys.stdlib_module_names:
        return None
    allowed = THIRD_PARTY[group] | THIRD_PARTY_OF_MODULE.get(name, set())
    if top in allowed:
        return None
    return f"what {group} may take from outside: {', '.join(sorted(allowed)) or 'none'}"


def _cycles(imports: dict[str, list[Import]]) -> list[str]:
    graph = {
        name: {item.target for item in items} & set(imports) for name, items in imports.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"import cycle: {' -> '.join(reversed(error.args[1]))}"]
    return []
