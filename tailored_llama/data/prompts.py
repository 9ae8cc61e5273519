"""Prompts: how an example is written out by a template set, for tuning and for scoring alike.

With the set `harness`, WinoGrande is scored by partial evaluation: each choice fills the gap of its own context, and
the sentence's rest is the continuation. Other shipped sets score the choice or its letter, which is another measure.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc

from tailored_llama.config import FEW_SHOTS, BenchmarkConfig, RunConfig, Work, is_json, is_written, stop_strings
from tailored_llama.data.benchmarks import Example, read_examples
from tailored_llama.data.chat import answer_end, find_chat, frozen, named_example, write_chat
from tailored_llama.data.schema import find_schema
from tailored_llama.data.templates import LETTERS, Layout, Template, layout_of, load_template, names_in
from tailored_llama.data.turns import Turns, find_turns
from tailored_llama.errors import InputError
from tailored_llama.store import read_table, write_table

PromptSplit = Literal["shots", "held_out", "selection", "evaluation"]
RenderedSplit = Literal["train", "selection", "evaluation"]  # train: shots and held_out

BYTES_A_TOKEN = 4  # of English, whichever the tokenizer

PROMPTS_SCHEMA = pa.schema(
    [
        ("example", pa.int32()),
        ("split", pa.string()),
        ("contexts", pa.list_(pa.string())),
        ("continuations", pa.list_(pa.string())),
        ("answer", pa.int32()),
        ("choice_lengths", pa.list_(pa.int32())),
        ("template", pa.string()),
        ("messages", pa.string()),  # as JSON, where a base's chat template asks
    ]
)


@dataclass(frozen=True)
class Prompt:
    """One example written out: a context and a continuation per choice, the right choice, the lengths for acc_norm.

    The space between the two belongs to the continuation. A length is the number of characters of the continuation
    without it, by which lm-evaluation-harness divides for acc_norm. If a base's chat template asks, `end` is the token
    after an answer, and `messages` are what it asks, as JSON.
    """

    example: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int
    choice_lengths: tuple[int, ...]
    end: str = ""
    messages: str = ""


def render(
    benchmark: BenchmarkConfig,
    template: Template,
    example: Example,
    header: str = "",
    ending: str = "",
    turns: Turns | None = None,
) -> Prompt:
    """Write one example out, after a header of solved examples and with an ending after every continuation.

    A base's chat template, `turns`, writes its messages alone. InputError: no template can word this example, or it has
    too few letters for the choices.
    """
    layout, messages = layout_of(template, benchmark), json.loads(example.fields.get("messages", "[]"))
    if turns:
        prompt, lengths = turns.ask(f"{benchmark.name} example {example.index}", messages), map(len, example.choices)
        answers = tuple(turns.delimiter + choice for choice in example.choices)
        told = turns.end, example.fields["messages"]
        return Prompt(example.index, (prompt,) * len(answers), answers, example.answer, tuple(lengths), *told)
    if len(messages) > 2:
        raise InputError(
            f"{benchmark.name} example {example.index}: got {len(messages)} messages before the answer; allowed: one "
            "of the user (and a system message), as the base model has no chat template"
        )
    start = header or _opening(layout, example)
    parts = [_fill(template, layout, example, choice) for choice in range(len(example.choices))]
    return Prompt(
        example=example.index,
        contexts=tuple(start + context for context, _, _ in parts),
        continuations=tuple(delimiter + text + ending for _, delimiter, text in parts),
        answer=example.answer,
        choice_lengths=tuple(len(text) for _, _, text in parts),
    )


def first_prompt(config: RunConfig, benchmark: BenchmarkConfig, train: Sequence[Example], base: Any = None) -> Prompt:
    """The prompt of the first train example that is not among the solved ones, as a run asks it."""
    template = load_template(config.prompts.template)
    solved, _ = select_train(train, config.scoring.num_fewshot, 0, config.seed, benchmark=benchmark.name)
    header, example = few_shot_header(benchmark, template, solved), [*without(train, solved), *train][0]
    return render(benchmark, template, example, header, turns=find_turns(base, benchmark))


def few_shot_header(benchmark: BenchmarkConfig, template: Template, examples: Sequence[Example]) -> str:
    """An instruction, once, and solved examples, each followed by a blank line, as lm-evaluation-harness joins them."""
    if not examples:
        return ""
    layout = layout_of(template, benchmark)
    is_bare = (layout.layout, layout.continuation) == ("{context}", "{choice}")
    header = _opening(layout, examples[0])
    for example in examples:
        written = "".join(_fill(template, layout, example, example.answer)) + "\n\n"
        header += example.fields.get("solved", written) if is_bare else written
    return header


def _opening(layout: Layout, example: Example) -> str:
    """The instruction and a blank line; without one, the description of a task of the harness."""
    return f"{layout.instruction}\n\n" if layout.instruction else example.fields.get("description", "")


def _fill(template: Template, layout: Layout, example: Example, choice: int) -> tuple[str, str, str]:
    """Context, delimiter and continuation of one choice; a task of the harness has a delimiter of its own."""
    values: dict[str, Any] = {**example.fields, "choice": example.choices[choice], "choices": example.choices}
    if {"listed", "letter"} & names_in(layout.layout + layout.continuation):
        if len(example.choices) > len(LETTERS):
            raise InputError(
                f"example {example.index}: got {len(example.choices)} choices; allowed: at most {len(LETTERS)}, the "
                f"letters of template {template.name}"
            )
        lettered = zip(LETTERS, example.choices, strict=False)
        values["listed"] = "\n".join(template.shown.format(letter=letter, choice=text) for letter, text in lettered)
        values["letter"] = LETTERS[choice]
    delimiter = example.fields.get("delimiter", " ") if layout.continuation == "{choice}" else " "
    delimiter = "" if layout.layout.endswith("\n") else delimiter
    return layout.layout.format(**values), delimiter, layout.continuation.format(**values)


@dataclass(frozen=True)
class Wording:
    """The wording of a benchmark in a template set; it is identified by its text, not by its file."""

    template: str  # the name of a shipped set, or the path of a file
    benchmark: BenchmarkConfig

    def identity(self) -> dict[str, Any]:
        """Return what prompts are made of besides the examples."""
        template = load_template(self.template)
        layout = layout_of(template, self.benchmark)
        shown = template.shown if "listed" in layout.in_context else None
        return {"name": template.name, **layout.model_dump(), "shown": shown}


@dataclass(frozen=True)
class PromptSettings:
    """Which examples are rendered, and how."""

    benchmark: str
    wording: Wording
    split: RenderedSplit
    shots: int | None = 0  # rendered for train, and left out of selection; None: as many as `tokens` allows
    held_out: int = 0  # likewise
    selection: int = 0  # to choose on: from the rest of train, or from a divided file's rows to choose with
    limit: int | None = None  # of evaluation, evenly spaced; None: all
    num_fewshot: int = 0  # solved examples before each question
    seed: int | None = 0  # of what is drawn; None: nothing is
    stop: str = ""  # what ends an answer that the model is to learn to write
    tokens: int = 0  # of the shots, each read once

    @classmethod
    def of(cls, config: RunConfig, benchmark: BenchmarkConfig, split: RenderedSplit, selection: int = 0) -> Self:
        tuning, num_fewshot = config.tuning, config.scoring.num_fewshot
        settings = cls(benchmark.name, Wording(config.prompts.template, benchmark), split, num_fewshot=num_fewshot)
        if split == "evaluation":
            return replace(settings, limit=config.scoring.limit, seed=config.seed if num_fewshot else None)
        stop = "".join(stop_strings(benchmark)[:1]) if split == "train" and is_written(benchmark) else ""
        shots, parts = config.shots_of(benchmark), len(config.benchmarks) if tuning.examples == "mixture" else 1
        tokens = tuning.tokens // (tuning.epochs * parts) if shots is None else 0
        drawn = replace(settings, shots=shots, tokens=tokens, held_out=tuning.held_out, selection=selection)
        return replace(drawn, seed=config.seed, stop=stop)


def render_prompts(
    examples: Path, dense: Path | None = None, *, settings: PromptSettings, work: Work
) -> dict[str, Any]:
    """Stage: write `prompts.parquet` from what `load_benchmark` wrote; return the number of prompts of each split.

    The chat template of `dense`, if it has one, asks rows of messages; a layout asks all others. `chat.json` says how a
    chat becomes such a prompt, or null, and has the schema of answers in JSON.

    The solved examples before each question are drawn first, from the train split by seed. They are the same for every
    question, in tuning and in scoring (lm-evaluation-harness calls this the `first_n` sampler; its default draws
    others for every document). They are never among the shots, the held-out or the evaluated examples. InputError:
    more train examples are requested than exist, or neither template can word this benchmark.
    """
    benchmark, template = settings.wording.benchmark, load_template(settings.wording.template)
    turns = find_turns(dense, benchmark)
    if turns and (shown := settings.num_fewshot):
        allowed = "0 for rows that the base's chat template asks"
        raise InputError(f"scoring.num_fewshot: got {shown} with {benchmark.name}; allowed: {allowed}")
    solved, chosen = _choose(examples, settings)
    header = few_shot_header(benchmark, template, solved)
    rows = [
        (name, render(benchmark, template, example, header, settings.stop, turns))
        for name, members in chosen.items()
        for example in members
    ]
    prompts = [prompt for _, prompt in rows]
    columns = {field.name: [getattr(p, field.name) for p in prompts] for field in fields(Prompt) if field.name != "end"}
    columns |= {"split": [name for name, _ in rows], "template": [template.name] * len(rows)}
    write_table(work.out / "prompts.parquet", columns, PROMPTS_SCHEMA)
    named = render(benchmark, template, named_example(benchmark), header, turns=turns)
    asked, *others = ((prompt.contexts, prompt.continuations) for prompt in (named, *prompts))
    of_base = {"template": turns.template, "end": turns.end} if turns else {}
    chat = find_chat(benchmark, asked, others, **of_base)
    if chat and is_json(benchmark):
        chat = replace(chat, schema=find_schema([e.choices[e.answer] for e in read_examples(examples, "train")]))
    write_chat(work.out, chat)
    return {name: len(members) for name, members in chosen.items()}


def _choose(examples: Path, settings: PromptSettings) -> tuple[list[Example], dict[PromptSplit, list[Example]]]:
    """The solved examples before each question, and the examples to render by split."""
    train = read_examples(examples, "train") if settings.split != "evaluation" or settings.num_fewshot else []
    solved, tuned, held = draw_train(settings, train)
    if settings.split == "evaluation":
        return solved, {"evaluation": select_evaluation(read_examples(examples, "evaluation"), settings.limit)}
    if settings.split == "train":
        return solved, {"shots": tuned, "held_out": held}
    rest = read_examples(examples, "selection") or without(train, solved + tuned + held)
    if settings.selection > len(rest):
        raise InputError(
            f"examples: got {settings.selection}; allowed: at most {len(rest)} ({settings.benchmark} has so many "
            "examples that are neither tuned on, held out, shown as solved nor reported on)"
        )
    # Answers are not balanced, because those of the split that results are reported on are not either.
    return solved, {"selection": random.Random(settings.seed or 0).sample(rest, settings.selection)}


def draw_train(settings: PromptSettings, train: Sequence[Example]) -> tuple[list[Example], ...]:
    """The solved examples before each question, the shots and the held-out examples, of a benchmark's train split.

    The size of a divided file's train part varies with its rows. If too few are left beside the shots, fewer are held
    out, at least one. InputError: more are requested than the split holds.
    """
    name, seed, num_fewshot, held_out = settings.benchmark, settings.seed or 0, settings.num_fewshot, settings.held_out
    if num_fewshot > len(train):
        allowed = f"at most {len(train)} (examples in the train split of {name})"
        raise InputError(f"scoring.num_fewshot: got {num_fewshot}; allowed: {allowed}")
    solved, _ = select_train(train, num_fewshot, 0, seed, benchmark=name)
    pool = without(train, solved)
    shots = _affordable(settings, solved, pool) if settings.shots is None else settings.shots
    if settings.wording.benchmark.data:
        held_out = min(held_out, max(len(pool) - shots, 1))
    if settings.shots is None and shots + held_out <= len(pool):
        # First, and unbalanced: nearly all rows are shots, and would leave only the commonest answers to hold out.
        held = random.Random(seed).sample(pool, held_out)
        return solved, select_train(without(pool, held), shots, 0, seed, benchmark=name)[0], held
    return solved, *select_train(pool, shots, held_out, seed, benchmark=name)


def _affordable(settings: PromptSettings, solved: Sequence[Example], pool: Sequence[Example]) -> int:
    """How many examples have the tokens of the settings, by their mean. All but the first 50 leave some to hold out.

    Messages are counted as they are, so that bases with different chat templates read the same.
    """
    benchmark, template = settings.wording.benchmark, load_template(settings.wording.template)
    header, some = few_shot_header(benchmark, template, solved), select_evaluation(pool, 1000)

    def size(example: Example) -> int:
        if messages := example.fields.get("messages"):
            return len((messages + example.choices[example.answer]).encode())
        prompt = render(benchmark, template, example, header)
        return len((prompt.contexts[prompt.answer] + prompt.continuations[prompt.answer]).encode())

    most = max(len(pool) - settings.held_out, min(FEW_SHOTS, len(pool) - 1))
    return max(1, min(most, settings.tokens * BYTES_A_TOKEN * len(some) // max(sum(map(size, some)), 1)))


def select_train(
    examples: Sequence[Example], shots: int, held_out: int, seed: int, *, benchmark: str
) -> tuple[list[Example], list[Example]]:
    """Draw the shots and the held-out examples from the train split, by seed, without overlap.

    Each draw has as equal numbers of every answer index as the split allows, in shuffled order. The shots do not
    depend on how many examples are held out. InputError: more are requested than the split holds.
    """
    if shots + held_out > (size := len(examples)):
        (field, got), (other, taken) = ("shots", shots), ("held_out", held_out)
        if held_out >= size:
            (field, got), (other, taken) = (other, taken), (field, got)
        raise InputError(
            f"tuning.{field}: got {got}; allowed: at most {max(size - taken, 0)} ({benchmark} has {size} train "
            f"examples to draw from, and tuning.{other} takes {taken})"
        )
    generator = random.Random(seed)
    remaining: dict[int, list[Example]] = {}
    for example in examples:
        remaining.setdefault(example.answer, []).append(example)
    for label in sorted(remaining):
        generator.shuffle(remaining[label])
    return _draw(remaining, shots, generator), _draw(remaining, held_out, generator)


def _draw(remaining: dict[int, list[Example]], count: int, generator: random.Random) -> list[Example]:
    """Take `count` examples out of `remaining`, one of every label in turn while they last."""
    drawn: list[Example] = []
    while len(drawn) < count:
        labels = sorted(label for label, examples in remaining.items() if examples)
        generator.shuffle(labels)  # decides which labels get one more if the count does not divide evenly
        drawn += [remaining[label].pop() for label in labels[: count - len(drawn)]]
    generator.shuffle(drawn)
    return drawn


def without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    used = {example.index for example in others}
    return [example for example in examples if example.index not in used]


def select_evaluation(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """`limit` examples evenly spaced over the split, in order, starting with its first; all if it has no more.

    The first rows of a split need not be like the rest: HellaSwag's first 3,243 all come from ActivityNet.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]


def read_prompts(folder: Path, split: PromptSplit) -> list[Prompt]:
    """The prompts of one split, as `render_prompts` wrote them; empty if it wrote none."""
    table, end = read_table(folder / "prompts.parquet", PROMPTS_SCHEMA), answer_end(folder)
    rows = table.filter(pc.equal(table["split"], split)).drop_columns(["split", "template"]).to_pylist()
    return [Prompt(**{name: frozen(value) for name, value in row.items()}, end=end) for row in rows]


def rows_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what prompts ask, offer and accept, in their order: the same for the same rows, wherever they are."""
    rows = [[prompt.contexts, prompt.continuations, prompt.answer] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
