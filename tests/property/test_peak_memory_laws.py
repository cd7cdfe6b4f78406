"""Peak activation memory against a simulation that shares nothing with the analysis of the graph.

The simulation works on the steps that a random network was made of. It decides by its own rules
which tensors share memory and what they are stored as, then walks through the schedule and asks at
every moment which buffers something still needs.
"""

import random
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch

from cgmq_fx.cost.peak_memory import Buffer, PeakMemory
from cgmq_fx.prepare import prepare
from memory_models import Plan, random_plan

SIDE = 4
ELEMENTS = Plan.CHANNELS * SIDE * SIDE
NAME = "peak_activation_memory"
READS_CODES = ("conv", "conv_wide", "layer_norm", "avg_pool", "add", "mul", "cat")
READS_CODES_IF_SHARED = ("max_pool", "relu", "norm", "double")
IN_PLACE = ("relu", "relu_", "norm", "double")
VIEWS = ("view", "dropout")


@dataclass(eq=False)
class Memory:
    """A piece of memory; `tag` is the tensor whose quantizer's codes it holds, None for floats."""

    elements: int
    names: list[int] = field(default_factory=list)
    tag: int | None = None
    is_copy: bool = False


class Simulation:
    """One network on paper: every tensor's memory, and what is read through which quantizer."""

    def __init__(self, plan: Plan) -> None:
        self.steps, self.outputs = plan.steps, plan.outputs
        self.readers = {
            tensor: [n for n, step in enumerate(self.steps, 1) if tensor in step.reads]
            for tensor in range(len(self.steps) + 1)
        }
        self.memory: list[Memory] = [Memory(ELEMENTS, [0])]
        for number, step in enumerate(self.steps, 1):
            self.memory.append(self.place(number, step.kind, step.reads))
        pieces = list(dict.fromkeys(self.memory))
        for piece in reversed(pieces):
            piece.tag = self.tag_of(piece)

    def place(self, number: int, kind: str, reads: tuple[int, ...]) -> Memory:
        operand = self.memory[reads[0]]
        shares = kind in VIEWS or (kind in IN_PLACE and self.may_overwrite(number, operand))
        if not shares:
            return Memory(ELEMENTS * (2 if kind == "cat" else 1), [number])
        operand.names.append(number)
        return operand

    def may_overwrite(self, number: int, piece: Memory) -> bool:
        needed = {reader for name in piece.names for reader in self.readers[name]}
        given_out = any(name in self.outputs for name in piece.names)
        return piece.names[0] != 0 and not given_out and needed <= {number, *piece.names}

    def is_rounded(self, number: int, tensor: int) -> bool:
        """Tell whether a step reads a tensor through the tensor's quantizer."""
        kind = self.steps[number - 1].kind
        shared = len(self.readers[tensor]) + (tensor in self.outputs) > 1
        return kind in READS_CODES or (kind in READS_CODES_IF_SHARED and shared)

    def tag_of(self, piece: Memory) -> int | None:
        tags: set[int | None] = set()
        for name in piece.names:
            if name in self.outputs:
                return None
            for reader in self.readers[name]:
                if self.is_rounded(reader, name):
                    tags.add(name)
                elif self.memory[reader] is piece:
                    continue
                elif self.steps[reader - 1].kind in ("clone", "max_pool"):
                    tags.add(self.memory[reader].tag)
                else:
                    return None
        return tags.pop() if len(tags) == 1 else None

    def moments(self) -> list[tuple[set[Memory], set[Memory]]]:
        """Return what each moment of the schedule reads, and what it writes."""
        copies: dict[int, Memory] = {}
        found: list[tuple[set[Memory], set[Memory]]] = [(set(), {self.memory[0]})]
        for number, step in enumerate(self.steps, 1):
            given: set[Memory] = set()
            for tensor in sorted(set(step.reads)):
                piece = self.memory[tensor]
                if not self.is_rounded(number, tensor) or piece.tag is not None:
                    given.add(piece)
                    continue
                if tensor not in copies:
                    copies[tensor] = Memory(piece.elements, tag=tensor, is_copy=True)
                    found.append(({piece}, {copies[tensor]}))
                given.add(copies[tensor])
            found.append((given, {self.memory[number]}))
        found.append(({self.memory[tensor] for tensor in self.outputs}, set()))
        return found

    def peak(self, bits: dict[int, int], *, in_float: bool = False) -> int:
        """Return the most bits held at a moment; a tensor's quantizer has ``bits[tensor]``."""
        moments = self.moments()
        most = 0
        for now in range(len(moments)):
            made = set().union(*(writes for _, writes in moments[: now + 1]))
            needed = set().union(*(reads | writes for reads, writes in moments[now:]))
            held = [piece for piece in made & needed if not (in_float and piece.is_copy)]
            width = {
                piece: 32 if in_float or piece.tag is None else bits[piece.tag] for piece in held
            }
            most = max(most, sum(piece.elements * width[piece] for piece in held))
        return most


def prepared_plan(seed: int):
    torch.manual_seed(seed)
    plan = random_plan(seed)
    x = torch.randn(2, Plan.CHANNELS, SIDE, SIDE)
    prepared = prepare(plan, {NAME: "1 GiB"}, example_inputs=(x,), learn_input_bits=True)
    return plan, prepared


def sites_of_tensors(prepared) -> dict[str, int]:
    """Return the number of the tensor that each quantizer of an activation reads."""
    nodes = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    calls = [node for node in prepared.graph.nodes if node.op.startswith("call_")]
    nodes += [node for node in calls if not str(node.target).startswith("quantizers.")]
    number = {node: place for place, node in enumerate(nodes)}
    return {
        str(node.target).rpartition(".")[2]: number[node.args[0]]
        for node in calls
        if node not in number and node.args[0] in number
    }


@pytest.mark.parametrize("block", range(20))
def test_the_peak_is_that_of_a_simulation(block):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        plan, prepared = prepared_plan(seed)
        accounting = prepared.plan.accounting
        resource, simulation = accounting.resources[NAME], Simulation(plan)
        tensor_of = sites_of_tensors(prepared)
        assert resource.reference * 8 == simulation.peak({}, in_float=True), plan.steps
        for _ in range(4):
            bits = [rng.choice(site.allowed) for site in accounting.sites]
            by_tensor = {
                tensor_of[site.name]: width
                for site, width in zip(accounting.sites, bits, strict=True)
                if site.name in tensor_of
            }
            total = accounting.totals(bits)[NAME]
            assert total * 8 == simulation.peak(by_tensor), (seed, plan.steps, by_tensor)


WIDTHS = (2, 3, 8, 32)


def random_resource(rng: random.Random) -> tuple[PeakMemory, list[Buffer]]:
    sites, steps = rng.randint(1, 6), rng.randint(1, 12)
    buffers = []
    for number in range(rng.randint(1, 10)):
        first = rng.randrange(steps)
        site = rng.choice((None, *range(sites)))
        bits = rng.choice((8, 32, 64))
        last = rng.randint(first, steps)
        buffers.append(Buffer(f"b{number}", rng.randint(1, 99), first, last, site, bits))
    return PeakMemory(buffers, sites, WIDTHS), buffers


def direct(buffers: list[Buffer], index: list[int]) -> list[int]:
    """Return the bits that are live at each step."""
    return [
        sum(
            b.elements * (b.bits if b.site is None else WIDTHS[index[b.site]])
            for b in buffers
            if b.first <= step <= b.last
        )
        for step in range(20)
    ]


def test_totals_changes_and_parts_agree_on_random_buffers():
    rng = random.Random(5)
    for _ in range(300):
        resource, buffers = random_resource(rng)
        index = [rng.randrange(len(WIDTHS)) for _ in range(resource.num_sites)]
        live = direct(buffers, index)
        assert resource.total_scaled(index) == max(live)
        assert resource.total_scaled(torch.tensor(index)) == max(live)
        assert sum(resource.costs(index)) == resource.total(index) == Fraction(max(live), 8)
        limit = rng.randint(0, max(live))
        for site in range(resource.num_sites):
            for to in range(len(WIDTHS)):
                moved = direct(buffers, [*index[:site], to, *index[site + 1 :]])
                assert resource.delta_scaled(site, to, index) == max(moved) - max(live)

                relief = resource.relief(site, to, index, limit)
                excess = [sum(max(0, bits - limit) for bits in run) for run in (live, moved)]
                assert (relief > 0) == (excess[1] < excess[0]) or max(live) <= limit


def test_the_lowest_widths_give_the_floor_and_widening_never_saves():
    rng = random.Random(6)
    for _ in range(200):
        resource, _ = random_resource(rng)
        allowed = [
            tuple(sorted(rng.sample(WIDTHS, rng.randint(1, 3)))) for _ in range(resource.num_sites)
        ]
        floor = resource.floor(allowed)
        for _ in range(5):
            index = [WIDTHS.index(rng.choice(choices)) for choices in allowed]
            assert resource.total(index) >= floor
            site = rng.randrange(resource.num_sites)
            if index[site] + 1 < len(WIDTHS):
                assert resource.delta(site, index[site] + 1, index) >= 0
        assert resource.total(resource.lowest(allowed).width_index) == floor
