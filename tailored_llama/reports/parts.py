"""What several reports show: figures as text and as cells of tables, and the table of costs."""

from collections.abc import Sequence

from tailored_llama.evaluation import RecoveryRow
from tailored_llama.progress import duration
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.store import Manifest


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


def points(share: float | None) -> str:
    """A difference of accuracies in points (hundredths of accuracy), with its sign; a dash for None."""
    return "–" if share is None else f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def lost(share: float, digits: int = 1) -> str:
    """A loss in points, without a sign; a gain has a minus sign."""
    return number(round(100 * share, digits) + 0.0, digits)


def points_lost(loss: float) -> str:
    """A loss in words; below zero it is a gain."""
    return f"gains {lost(-loss)} points" if loss < 0 else f"loses {lost(loss)} points"


def p_value(p: float) -> str:
    """A p-value with four digits."""
    return number(p, 4) if p >= 0.0001 else "< 0.0001"


def megabytes(count: float) -> str:
    """Bytes in MB, a million each."""
    return f"{number(count / 1e6, 0 if count >= 1e7 else 1)}\N{NO-BREAK SPACE}MB"


def listed(texts: Sequence[str], last: str = " and ") -> str:
    """Texts as a list in a sentence: "a, b and c"."""
    return last.join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def accuracy_cell(value: float | None, error: float | None) -> Cell:
    """An accuracy ± its standard error; a dash for None."""
    if value is None:
        return Cell("–")
    return Cell(f"{number(value)} ± {number(error)}", brief=f"{number(value)}±{number(error).lstrip('0')}")


def accuracy_of(row: RecoveryRow | None) -> Cell:
    """The accuracy in a row ± its standard error; a dash without a row."""
    return accuracy_cell(row.accuracy, row.stderr) if row else Cell("–")


def share_cell(value: float | None, low: float | None, high: float | None, more: str = "", digits: int = 0) -> Cell:
    """A fraction as a percentage, with its interval and `more` below it; on a terminal, "97.9 % (94–103)"."""
    under = () if value is None else (span(low, high), more)
    bounds = span(low, high, 0).removesuffix("\N{NO-BREAK SPACE}%").replace(" to ", ", ")
    return Cell(percent(value), under, percent(value, digits) + (f" ({bounds})" if bounds else ""))


def cost_table(costs: Sequence[tuple[str, Manifest]]) -> Table:
    """Show the time that the artifacts of each stage and label took, and all together."""
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for label, cost in costs:
        groups.setdefault((cost.stage, label), []).append(cost)
    if costs:
        groups["together", ""] = [cost for _, cost in costs]
    rows = []
    for (stage, label), group in groups.items():
        seconds, memory = sum(cost.seconds for cost in group), max(cost.peak_memory_bytes for cost in group)
        peak = megabytes(memory) if memory else "–"
        rows.append(table_row(stage, label, duration(seconds), peak, bold=stage == "together"))
    columns = (Column("stage", left=True), Column("of", left=True), Column("wall time"), Column("peak memory"))
    return Table(columns, tuple(rows))
