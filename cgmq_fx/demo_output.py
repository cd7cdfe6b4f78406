"""What the demo shows while it runs, and what it leaves behind."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from cgmq_fx.errors import UsageError
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.report import Report
from cgmq_fx.units import format_amount


class Phase:
    """A phase of training on the screen: a bar in a terminal, a line for each epoch elsewhere."""

    def __init__(self, name: str, epochs: int, console: Console) -> None:
        self._name, self._epochs, self._console = name, epochs, console
        self._epoch = 0
        self._bar = Progress(
            TextColumn("[bold]{task.description:<15}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=epochs, state="")

    def __enter__(self) -> "Phase":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, loss: float, accuracy: float, budget_share: float | None = None) -> None:
        """Show that an epoch is over.

        Args:
            loss: mean training loss of the epoch.
            accuracy: on the validation images, in [0, 1].
            budget_share: the cost as a part of the budget; None where there is none.
        """
        self._epoch += 1
        state = f"loss {loss:.3f}  val {100 * accuracy:5.1f} %"
        if budget_share is not None:
            state += f"  {100 * budget_share:,.0f} % of budget"
        self._bar.update(self._task, advance=1, state=state)
        if not self._console.is_terminal:
            self._console.print(f"{self._name} {self._epoch}/{self._epochs}  {state}")


def print_task(console: Console, prepared: PreparedModule) -> None:
    """Print what is to be quantized to which budget, and how low it could go."""
    accounting = prepared.plan.accounting
    ((name, limit),) = accounting.limits.items()
    resource = accounting.resources[name]
    floor = resource.floor([site.allowed for site in accounting.sites])
    macs = sum(bound.operation.macs for bound in accounting.operations)
    console.print(f"{type(prepared).__name__}: {macs:,} MACs for an image of 8 x 8 pixels")
    lines = Table.grid(padding=(0, 2))
    for label, amount in (
        ("  at 32 bits", resource.reference),
        ("  budget", limit),
        ("  at the lowest bit-widths", floor),
    ):
        share = f"{float(100 * amount / resource.reference):.4g} %"
        lines.add_row(label, format_amount(amount, resource.unit), share)
    console.print(lines)
    console.print()


def print_comparison(
    console: Console, report: Report, float_accuracy: float, accuracy: float, *, images: int
) -> None:
    """Print the float and the quantized network side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column(f"on {images} test images")
    for head in ("accuracy", "bit-widths", "bit operations", "of 32 bits"):
        table.add_column(head, justify="right")
    (bops,) = report.resources
    widths = ", ".join(map(str, sorted({width for row in report.rows for width in row.bits})))
    for name, score, bits, cost in (
        ("float", float_accuracy, "32", bops.reference),
        ("quantized", accuracy, widths, bops.total),
    ):
        share = f"{float(100 * cost / bops.reference):.5g} %"
        amount = format_amount(cost, bops.unit)
        table.add_row(name, f"{100 * score:.2f} %", bits, amount, share)
    console.print()
    console.print(table)


def write_results(
    out: Path,
    report: Report,
    history: Mapping[str, Any],
    states: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[Path, ...]:
    """Write the report as text, JSON and CSV, the history and each state dict."""
    texts = {
        "report.txt": f"{report}\n",
        "report.json": report.to_json(),
        "report.csv": report.to_csv(),
        "history.json": json.dumps(history, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    for name, state in states.items():
        torch.save(dict(state), out / f"{name}.pt")
    return tuple(out / name for name in [*texts, *(f"{name}.pt" for name in states)])


def make_folder(out: Path) -> None:
    """Make the folder of the results.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the results cannot go to {out}: {error.strerror}; name another folder (--out DIR)"
        ) from error
