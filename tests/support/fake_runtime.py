"""A runtime whose times follow from the operations alone, and the clock that they pass on."""

from cgmq_fx.measure.timing import TimingPlan
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.names import operation_names
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.report import report

OVERHEAD = 2e-5
PER_CALL = 1e-6


class FakeClock:
    """Seconds that only `FakeRuntime` lets pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def plan(self, rounds=5):
        return TimingPlan(rounds=rounds, round_seconds=0.0, warm_up=1, clock=self)


class FakeRuntime:
    """Takes so long for every operation, half as long at 8 bits, and for each call besides."""

    name = "fake"
    version = "fake 1.0"
    pairs = ((8, 8), (32, 32))

    def __init__(self, clock, overhead=OVERHEAD):
        self.clock = clock
        self.overhead = overhead

    def export(self, fixed, inputs):
        return FakeExported(self, fixed)


class FakeExported:
    """A model of which parts can be run: each takes what its operations do."""

    def __init__(self, runtime, fixed):
        self.runtime = runtime
        self.graph = fixed.graph
        Pipeline((AnnotateOperations(),)).run(fixed)
        rows = {row.name: seconds_of(row) for row in report(fixed).rows}
        self.seconds = {node: rows.get(name, 0.0) for node, name in operation_names(fixed).items()}
        self.outputs = next(iter(reversed(fixed.graph.nodes))).all_input_nodes

    def whole(self):
        return self._call(self.outputs)

    def part(self, outputs):
        return self._call([self.outputs[place] for place in outputs])

    def _call(self, wanted):
        needed = set(wanted)
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed |= set(node.all_input_nodes)
        seconds = self.runtime.overhead + sum(self.seconds.get(node, 0.0) for node in needed)

        def call():
            self.runtime.clock.now += seconds

        return call


def seconds_of(row):
    """Return what one row of a report takes."""
    wide = [bits for bits in (row.weight_bits, row.activation_bits) if bits is not None]
    per_mac = 1e-9 if wide and max(wide) <= 8 else 2e-9
    return (PER_CALL if row.op in ("conv2d", "linear", "add") else 0.0) + row.macs * per_mac
