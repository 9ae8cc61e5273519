"""Figures as text and as cells of tables, and the tables that several reports have: of speeds and of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import rich.table

from tailored_llama.evaluation import ModelRow, ProfileRow, RecoveryRow, TemplateRow
from tailored_llama.reports.tables import Cell, Column, Row, Table, table_row, terminal
from tailored_llama.store import Manifest

NO_DIFFERENCE = "no difference measured"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign and thousands separators; a dash for None, ∞ if unbounded."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−").replace("inf", "∞")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{number(100 * value, digits)}\N{NO-BREAK SPACE}%"


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """A 95 % interval of a fraction, in percent; empty for None."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    return f"{number(100 * low, digits)}{between}{number(100 * high, digits)}\N{NO-BREAK SPACE}%"


def share(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, with its interval in brackets if it has one: "97.9 % (94–103)"."""
    bounds = span(low, high, 0).removesuffix("\N{NO-BREAK SPACE}%").replace(" to ", ", ")
    return f"{percent(value, digits)} ({bounds})" if bounds else percent(value, digits)


def points(share: float | None) -> str:
    """A difference of accuracies in points (hundredths of accuracy), with its sign; a dash for None."""
    return "–" if share is None else f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def lost(share: float, digits: int = 1) -> str:
    """A loss in points, without a sign; a gain has a minus sign."""
    return number(round(100 * share, digits) + 0.0, digits)


def p_value(p: float) -> str:
    """A p-value with four digits."""
    return number(p, 4) if p >= 0.0001 else "< 0.0001"


def megabytes(count: float) -> str:
    """Bytes in MB, a million each."""
    return f"{number(count / 1e6, 0 if count >= 1e7 else 1)}\N{NO-BREAK SPACE}MB"


def duration(seconds: float) -> str:
    """Seconds in the units that a reader would choose."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def listed(texts: Sequence[str], last: str = " and ") -> str:
    """Texts as a list in a sentence: "a, b and c"."""
    return last.join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def accuracy_cell(value: float | None, error: float | None) -> Cell:
    """An accuracy ± its standard error; a dash for None."""
    if value is None:
        return Cell("–")
    return Cell(f"{number(value)} ± {number(error)}", brief=f"{number(value)}±{number(error).lstrip('0')}")


def accuracy_of(row: RecoveryRow | TemplateRow | None) -> Cell:
    """The accuracy in a row ± its standard error; a dash without a row."""
    return accuracy_cell(row.accuracy, row.stderr) if row else Cell("–")


def share_cell(value: float | None, low: float | None, high: float | None, more: str = "", digits: int = 0) -> Cell:
    """A fraction as a percentage, with its interval and `more` below it; `digits` are those on a terminal."""
    under = () if value is None else tuple(filter(None, (span(low, high), more)))
    return Cell(percent(value), under, share(value, low, high, digits))


def speedup(row: ModelRow | ProfileRow, phase: str) -> str:
    """How many times the dense model's speed a row has in a phase, prefill or decode; empty where nothing was timed.

    The figure is the median of pairs of passes. Where some pairs say faster and others slower, there is no figure.
    """
    value, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return NO_DIFFERENCE if low <= 1 <= high else f"×{number(value, 2)}"


def speed_table(rows: Sequence[ProfileRow], other: str = "other") -> Table:
    """A row for each checkpoint and batch size; `other` names the checkpoint that speeds are compared with."""
    speeds = [Column(title) for verb in ("reads", "writes") for title in (f"{verb}\ntokens/s", f"× {other}")]
    columns = (Column("checkpoint", left=True), Column("batch"), *speeds, Column("peak\nmemory"))
    lines = []
    for row in rows:
        cells = [Cell(row.checkpoint), Cell(number(row.batch, 0))]
        for phase in ("prefill", "decode"):
            cells += [Cell(number(getattr(row, f"{phase}_tokens_per_second"), 1)), Cell("–")]
            middle, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
            if middle is not None:
                pairs = f"{number(low, 2)}–{number(high, 2)}"
                cells[-1] = Cell(speedup(row, phase), (pairs,), f"{number(middle, 2)}\n{pairs}")
        lines.append(table_row(*cells, megabytes(row.peak_memory_bytes)))
    return Table(columns, tuple(lines), (_how_timed(rows, other),))


def _how_timed(rows: Sequence[ProfileRow], other: str) -> str:
    row = rows[0]
    threads = f", {row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    types = listed(list(dict.fromkeys(one.dtype for one in rows)))
    base = listed(list(dict.fromkeys(megabytes(one.base_memory_bytes) for one in rows)))
    memory = "what torch allocated"
    if row.device == "cpu":
        memory = f"that of the process; {base} of it are the interpreter and libraries"
    compared = any(one.prefill_speedup for one in rows)
    against = f"; × {other}: the speed ÷ its, the median and range of pairs of passes, which take turns" * compared
    return (
        f"Timed on {row.device}{threads}, in {types}: {row.prompt_tokens} tokens a prompt, {row.new_tokens} new ones. "
        f"Median of {row.repeats} passes{against}. Memory is {memory}. Other machines give other numbers."
    )


def profile_table(rows: Sequence[ProfileRow]) -> rich.table.Table:
    """The table of 80 characters, with the size of each checkpoint below it."""
    table = speed_table(rows)
    sizes = {
        row.checkpoint: f"{row.checkpoint}: {number(row.parameters, 0)} parameters, {megabytes(row.weight_bytes)}"
        for row in rows
    }
    return terminal(replace(table, notes=(*sizes.values(), *table.notes)))


def cost_table(costs: Sequence[tuple[str, Manifest]]) -> Table:
    """What the artifacts of each stage and label took, and all together."""
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for label, cost in costs:
        groups.setdefault((cost.stage, label), []).append(cost)
    rows = [_cost_row(*group, own) for group, own in groups.items()]
    if rows:
        rows.append(replace(_cost_row("together", "", [cost for _, cost in costs]), bold=True))
    columns = (Column("stage", left=True), Column("of", left=True), Column("wall time"), Column("peak memory"))
    return Table(columns, tuple(rows))


def _cost_row(stage: str, label: str, costs: Sequence[Manifest]) -> Row:
    seconds, memory = sum(cost.seconds for cost in costs), max(cost.peak_memory_bytes for cost in costs)
    return table_row(stage, label, duration(seconds), megabytes(memory))
