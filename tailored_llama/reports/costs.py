"""The table of costs: what artifacts took to make."""

from collections.abc import Sequence
from dataclasses import replace

from tailored_llama.progress import duration
from tailored_llama.reports.parts import megabytes
from tailored_llama.reports.tables import Column, Row, Table, table_row
from tailored_llama.store import Manifest


def cost_table(costs: Sequence[tuple[str, Manifest]]) -> Table:
    """Show the time that the artifacts of each stage and label took, and all together."""
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for label, cost in costs:
        groups.setdefault((cost.stage, label), []).append(cost)
    rows = [_cost_row(*group, of_stage) for group, of_stage in groups.items()]
    if rows:
        rows.append(replace(_cost_row("together", "", [cost for _, cost in costs]), bold=True))
    columns = (Column("stage", left=True), Column("of", left=True), Column("wall time"), Column("peak memory"))
    return Table(columns, tuple(rows))


def _cost_row(stage: str, label: str, costs: Sequence[Manifest]) -> Row:
    seconds, memory = sum(cost.seconds for cost in costs), max(cost.peak_memory_bytes for cost in costs)
    return table_row(stage, label, duration(seconds), megabytes(memory) if memory else "–")
