"""The terminal table of a profile: what a checkpoint costs compared with another, measured and expected."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.evaluation import ProfileRow, token_flops


def profile_table(rows: Sequence[ProfileRow]) -> Table:
    """A table of 80 characters: a column for each checkpoint, then the ratios of their costs."""
    own, other = ([row for row in rows if row.role == role] for role in ("checkpoint", "against"))
    first = [role_rows[0] for role_rows in (own, other) if role_rows]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    table.caption, table.caption_style = escape("\n".join(_notes(first))), "none"
    table.add_column("", no_wrap=True)
    for row in first:
        table.add_column(escape(row.checkpoint), justify="right", overflow="fold")
    for name in ("ratio", "expected") if other else ():
        table.add_column(name, justify="right", no_wrap=True)
    for label, scale, digits, values in (
        ("parameters", 1, 0, [row.parameters for row in first]),
        ("  a token needs", 1, 0, [row.computed_parameters for row in first]),
        ("weights, MB", 1e6, 1, [row.weight_bytes for row in first]),
        ("MFLOPs a token", 1e6, 1, [token_flops(row) for row in first]),
        ("  in attention", 1e6, 1, [row.attention_flops for row in first]),
        ("MFLOPs a prompt", 1e6, 1, [row.prompt_flops for row in first]),
    ):
        table.add_row(label, *(f"{value / scale:,.{digits}f}" for value in values), *_ratio(values))
    for index, row in enumerate(own):
        both = [role_rows[index] for role_rows in (own, other) if role_rows]
        table.add_section()
        table.add_row(f"[bold]batch {row.batch}[/]")
        for phase in ("prefill", "decode"):
            cells = [f"{getattr(one, f'{phase}_tokens_per_second'):,.1f}" for one in both]
            if row.expected_parameters is not None:
                middle, low, high = (getattr(row, f"{phase}_speedup{end}") for end in ("", "_low", "_high"))
                expected = getattr(row, f"expected_{phase}")
                cells += [f"{middle:.2f} ({low:.2f}–{high:.2f})", f"{expected:.2f} / {row.expected_parameters:.2f}"]
            table.add_row(f"  {phase} tokens/s", *cells)
        memory = [one.peak_memory_bytes for one in both]
        table.add_row("  peak memory, MB", *(f"{value / 1e6:,.0f}" for value in memory), *_ratio(memory))
    return table


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
