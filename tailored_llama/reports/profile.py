"""The terminal table of a profile: what a checkpoint costs compared with another, measured and expected."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import rich.table

from tailored_llama.evaluation import ProfileRow, token_flops
from tailored_llama.reports.tables import Column, Table, table_row, terminal


def profile_table(rows: Sequence[ProfileRow]) -> rich.table.Table:
    """A table of 80 characters: a column for each checkpoint, then the ratios of their costs."""
    own, other = ([line for line in rows if line.role == role] for role in ("checkpoint", "against"))
    first = [role_rows[0] for role_rows in (own, other) if role_rows]
    names = ["\n".join(textwrap.wrap(line.checkpoint, 14)) for line in first]
    columns = [Column("", left=True), *map(Column, [*names, *(["ratio", "expected"] if other else [])])]
    lines = [
        table_row(label, *(f"{value / scale:,.{digits}f}" for value in values), *_ratio(values))
        for label, scale, digits, values in (
            ("parameters", 1, 0, [line.parameters for line in first]),
            ("  a token needs", 1, 0, [line.computed_parameters for line in first]),
            ("weights, MB", 1e6, 1, [line.weight_bytes for line in first]),
            ("MFLOPs a token", 1e6, 1, [token_flops(line) for line in first]),
            ("  in attention", 1e6, 1, [line.attention_flops for line in first]),
            ("MFLOPs a prompt", 1e6, 1, [line.prompt_flops for line in first]),
        )
    ]
    for index, line in enumerate(own):
        both = [role_rows[index] for role_rows in (own, other) if role_rows]
        lines.append(table_row(f"batch {line.batch}"))
        for phase in ("prefill", "decode"):
            cells = [f"{getattr(one, f'{phase}_tokens_per_second'):,.1f}" for one in both]
            if line.expected_parameters is not None:
                middle, low, high = (getattr(line, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
                expected = getattr(line, f"expected_{phase}")
                cells += [f"{middle:.2f} ({low:.2f}–{high:.2f})", f"{expected:.2f} / {line.expected_parameters:.2f}"]
            lines.append(table_row(f"  {phase} tokens/s", *cells))
        memory = [one.peak_memory_bytes for one in both]
        lines.append(table_row("  peak memory, MB", *(f"{value / 1e6:,.0f}" for value in memory), *_ratio(memory)))
    return terminal(Table(tuple(columns), tuple(lines), tuple(_notes(first))))


def _ratio(values: Sequence[int]) -> list[str]:
    """The cell other ÷ own, if there is another checkpoint."""
    return [f"{values[1] / values[0]:.2f}"] if len(values) == 2 and values[0] else []


def _notes(rows: Sequence[ProfileRow]) -> list[str]:
    """Notes on what was measured and how to read it."""
    row = rows[0]
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    setting = ", ".join(filter(None, [row.device, threads, " and ".join(dict.fromkeys(r.dtype for r in rows))]))
    base = " and ".join(dict.fromkeys(f"{r.base_memory_bytes / 1e6:,.0f}" for r in rows))
    notes = [
        f"{row.prompt_tokens} tokens a prompt, {row.new_tokens} new ones; median of {row.repeats}; {setting}.",
        f"Memory is that of the process; {base} MB of it are the interpreter and libraries."
        if row.device == "cpu"
        else "Memory is what torch allocated.",
    ]
    if len(rows) > 1:
        notes += [
            "Ratio: cost of the second ÷ cost of the first; speeds: median and range of pairs.",
            "Expected: the ratio of FLOPs / of the parameters that a token needs.",
        ]
    return notes
