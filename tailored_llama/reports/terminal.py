"""The terminal table of a run."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from tailored_llama.config import DENSE
from tailored_llama.evaluation import MEAN, MODELS, PRUNED, TAILORED, RecoveryTable, read_recovery, recovery_tables
from tailored_llama.reports.diagnosis import diagnosis_lines, read_diagnoses
from tailored_llama.reports.parts import NO_DIFFERENCE, percent, share, speedup
from tailored_llama.reports.text import benchmark_notes, kept_tokens, perplexities, plus_minus, run_name
from tailored_llama.reports.tuned_dense import read_tuned_dense, tuned_dense_notes


def recovery_table(folder: Path) -> Table:
    """The table of a report's folder, 80 characters wide, with sizes, perplexities, notes and diagnoses below it."""
    tables = recovery_tables(*read_recovery(folder))
    sizes = [text for table in tables if (text := _sizes(table, named=len(tables) > 1))]
    printed = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left", caption_style="none")
    notes = tuned_dense_notes(read_tuned_dense(folder)) + benchmark_notes(tables)
    legend = "Accuracy ± standard error; recovery with its 95 % interval."
    printed.caption = escape("\n".join([legend, *sizes, *notes, *diagnosis_lines(read_diagnoses(folder))]))
    printed.add_column("benchmark", overflow="fold")
    for name in (*MODELS, "recovery", "chance-corrected"):
        printed.add_column(name, justify="right")
    for table in tables:
        if len(tables) > 1:
            printed.add_row(f"[bold]{run_name(table.ratio)}[/]")
        for name in table.lines:
            cells = [name, *(plus_minus(table.row(model, name)).replace(" ± 0", "±") for model in MODELS)]
            if row := table.row(TAILORED, name):
                cells.append(share(row.recovery, row.recovery_low, row.recovery_high, 0))
                cells.append(share(row.chance_corrected, row.cc_low, row.cc_high, 0))
            else:
                cells += ["–", "–"]
            printed.add_row(*map(escape, cells), style="bold" if name == MEAN else None)
        printed.add_section()
    return printed


def _sizes(table: RecoveryTable, named: bool) -> str:
    """Parameters and perplexity, before → after, as far as they are known."""
    dense, pruned = table.size(DENSE), table.size(PRUNED)
    parts = []
    if dense.parameters:
        after = f" → {pruned.parameters:,}" if pruned.parameters else ""
        if pruned.parameters and dense.body and pruned.body:
            shares = 1 - pruned.parameters / dense.parameters, 1 - pruned.body / dense.body
            after += f" (−{percent(shares[0])}; −{percent(shares[1])} outside the embeddings)"
        parts.append(f"parameters {dense.parameters:,}{after}")
    if tokens := kept_tokens(table):
        parts.append(tokens)
    measure, (before, after, mended) = perplexities(table)
    if before:
        steps = [before, *filter(None, [after]), *([f"{mended} (healed)"] if mended else [])]
        parts.append(f"{measure} {' → '.join(steps)}")
    if (reading := speedup(pruned, "prefill")) and (writing := speedup(pruned, "decode")):
        same = reading == writing == NO_DIFFERENCE
        parts.append(f"speed: {reading}" if same else f"speed {reading} reading, {writing} writing")
    text = "; ".join(parts)
    return f"{run_name(table.ratio)}: {text}" if text and named else text[:1].upper() + text[1:]
