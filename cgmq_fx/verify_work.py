"""The work of a stored operation, computed anew from its shapes and attributes.

Nothing of the code that counted it when the model was prepared is used.
"""

from collections.abc import Iterator, Mapping, Sequence

from cgmq_fx.cost.operation import OPERAND_NAMES, Attribute, Operation
from cgmq_fx.manifest import (
    FLOAT_BITS,
    Manifest,
    StoredOperation,
    StoredSite,
    StoredWeight,
)

#: Classes whose work follows from what is stored; that of others, where they have any, was counted
#: by running the model.
_PRODUCTS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
     "linear", "matmul", "attention"}
)  # fmt: skip
_WITHOUT_WORK = frozenset({"add", "sub", "mul", "div", "cat", "embedding"})


class _MissingError(Exception):
    """An operation lacks an attribute that its work follows from."""


def work_faults(manifest: Manifest) -> Iterator[str]:
    """Yield every operation whose work, shapes, bit sources and weights contradict each other."""
    stored: dict[int, list[StoredWeight]] = {}
    for weight in manifest.weights:
        stored.setdefault(weight.site, []).append(weight)
        role = manifest.sites[weight.site].role
        if role != "weight":
            yield f"the weight {weight.name!r} has a site for an {role}"
    computed = {grid.site for grid in manifest.quantizers}  # weights that are no constants
    for index, weights in stored.items():
        site, most = manifest.sites[index], max(weight.elements for weight in weights)
        if most != site.elements and index not in computed:
            yield (
                f"the weights of {site.name!r} have {most:,} elements, their site {site.elements:,}"
            )
    for item in manifest.operations:
        operation = item.operation
        place = f"operation {operation.name!r} ({operation.op})"
        try:
            found = list(_faults(item, stored, manifest.sites))
        except _MissingError as error:
            found = [f"has no number {error}"]
        yield from (f"{place} {text}" for text in found)


def counted(operation: Operation) -> bool:
    """Tell whether the MACs of an operation were counted by a run and cannot be recomputed."""
    return operation.macs > 0 and not _is_product(operation)


def _is_product(operation: Operation) -> bool:
    return operation.op in _PRODUCTS and operation.operands != "none"


def _faults(
    item: StoredOperation,
    stored: Mapping[int, list[StoredWeight]],
    sites: Sequence[StoredSite],
) -> Iterator[str]:
    operation, num_sites = item.operation, len(sites)
    wanted = len(OPERAND_NAMES[operation.operands])
    if len(item.sources) != wanted:
        yield f"has {len(item.sources)} bit-widths, not {wanted}"
        return
    strange = [s.site for s in item.sources if s.site is not None and s.site >= num_sites]
    if strange:
        yield f"has the sites {strange} of {num_sites}"
        return
    for source in item.sources:
        if source.bits is not None and source.bits != FLOAT_BITS:
            yield f"has an operand of {source.bits} bits without a quantizer; float is {FLOAT_BITS}"
    if _is_product(operation):
        macs = _macs(operation)
        if macs != operation.macs:
            yield f"says {operation.macs:,} MACs, its shapes come to {macs:,}"
    elif operation.operands != "none" and operation.op in _WITHOUT_WORK and operation.macs:
        yield f"says {operation.macs:,} MACs, and does none"
    if operation.operands == "weight":
        yield from _weight_faults(item, stored)
        yield from _site_faults(item, sites)


def _macs(operation: Operation) -> int:
    """Return the multiply-accumulates of a product."""
    number = _Numbers(operation.attributes)
    if operation.op == "linear":
        return operation.output_elements * number["in_features"]
    if operation.op in ("matmul", "attention"):
        return number["batch"] * number["m"] * number["n"] * number["k"]
    groups = number["groups"]
    if groups < 1:
        raise _MissingError("'groups' above 0")
    if operation.op.startswith("conv_transpose"):
        # Each input element meets the kernels of the outputs of its group.
        return operation.input_elements * (number["out_channels"] // groups) * _kernel(number)
    return operation.output_elements * (number["in_channels"] // groups) * _kernel(number)


def _site_faults(item: StoredOperation, sites: Sequence[StoredSite]) -> Iterator[str]:
    """Yield operands that are larger than all tensors that their quantizers see."""
    operation = item.operation
    if operation.op not in _PRODUCTS or operation.target.startswith("cgmq_fx."):
        return  # the steps of a recurrent layer read parts of tensors
    read = (operation.weights, operation.input_elements)
    for elements, source in zip(read, item.sources, strict=True):
        if source.site is not None and elements > sites[source.site].elements:
            site = sites[source.site]
            yield f"reads {elements:,} elements through {site.name!r}, which has {site.elements:,}"


class _Numbers:
    def __init__(self, attributes: Mapping[str, Attribute]) -> None:
        self._attributes = attributes

    def __getitem__(self, name: str) -> int:
        value = self._attributes.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _MissingError(repr(name))
        return value


def _kernel(number: _Numbers) -> int:
    size = 1
    for axis in range(number["spatial_dims"]):
        if axis > 2:
            raise _MissingError("of at most 3 'spatial_dims'")
        size *= number[f"kernel_{axis}"]
    return size


def _weight_faults(
    item: StoredOperation, stored: Mapping[int, list[StoredWeight]]
) -> Iterator[str]:
    """Yield where the weight that an operation reads is not the one that the file holds."""
    operation = item.operation
    site = item.sources[0].site
    number = _Numbers(operation.attributes)
    if operation.op.startswith("conv") and number["kernel_size"] != _kernel(number):
        yield f"has a kernel_size of {number['kernel_size']}, its axes come to {_kernel(number)}"
    shape = _weight_shape(operation, number)
    elements = operation.weights
    if shape is not None and shape[0] * shape[1] != elements:
        yield f"says {elements:,} weights, its attributes come to {shape[0] * shape[1]:,}"
    held = stored.get(-1 if site is None else site)
    if held and all(weight.elements != elements for weight in held):
        found = ", ".join(f"{weight.name!r} has {weight.elements:,}" for weight in held[:3])
        yield f"says {elements:,} weights, and {found}"
    elif held and shape is not None and all(_first_axis(w) != shape[0] for w in held):
        found = ", ".join(f"{weight.name!r} has shape {list(weight.shape)}" for weight in held[:3])
        yield f"has {shape[0]:,} channels along its weight, and {found}"


def _first_axis(weight: StoredWeight) -> int:
    return weight.shape[0] if len(weight.shape) > 1 else 1


def _weight_shape(operation: Operation, number: _Numbers) -> tuple[int, int] | None:
    """Return the extent of the weight's first axis and that of all others together."""
    if operation.op == "linear":
        return number["out_features"], number["in_features"]
    if not operation.op.startswith("conv"):
        return None
    groups, transposed = number["groups"], operation.op.startswith("conv_transpose")
    first, second = number["out_channels"], number["in_channels"]
    if transposed:
        first, second = second, first
    return first, second // groups * _kernel(number)
