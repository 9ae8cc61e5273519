"""What a run says of the user's own files before it starts: the rows of each part, and what so many can show."""

from __future__ import annotations

from collections.abc import Iterator

from tailored_llama.config import BenchmarkConfig, RunConfig
from tailored_llama.data import PURPOSE, Split, benchmarks, held_out_of
from tailored_llama.evaluation import DISCORDANT, detectable_difference

FEW = 50  # rows in a part; below, an accuracy has a standard error of 7 points at its worst


def scored_rows(config: RunConfig, benchmark: BenchmarkConfig) -> int:
    """The rows of a benchmark that are scored in the end.

    Raises:
        InputError: as `load_examples`.
    """
    rows = len(benchmarks.load_examples(benchmark, "evaluation", config.store.downloads))
    return min(rows, config.scoring.limit or rows)


def rows_of(config: RunConfig) -> Iterator[str]:
    """What there is to say of every file that is divided, with a warning for every part with few rows.

    Raises:
        InputError: as `load_examples`.
    """
    for benchmark in config.benchmarks:
        if not (file := benchmark.data):
            continue
        rows: dict[Split, int] = {
            part: len(benchmarks.load_examples(benchmark, part, config.store.downloads)) for part in PURPOSE
        }
        scored = min(rows["evaluation"], config.scoring.limit or rows["evaluation"])
        parts = ", ".join(f"{count:,} {PURPOSE[part]}" for part, count in rows.items())
        yield f"{file}: {sum(rows.values()):,} different rows, {parts}."
        points, share = 100 * detectable_difference(scored), 100 * DISCORDANT
        yield (
            f"{file}: {scored:,} scored rows show a difference in accuracy of {points:.1f} points or more (at 95 % "
            f"confidence, if two models differ on {share:.0f} % of the rows)."
        )
        for part, count in rows.items():
            if count < FEW:
                yield f"warning: {file}: {count} rows {PURPOSE[part]} are few. More rows make the result more certain."
        tuning = config.tuning
        held_out = held_out_of(benchmark, tuning.shots, tuning.held_out, rows["train"])
        if tuning.examples != "none" and held_out < tuning.held_out:
            yield f"warning: {file}: {held_out} rows are left to hold out, not tuning.held_out = {tuning.held_out}."
