"""Prompts: how an example is written out by a template set, for tuning and for scoring alike.

With the set `harness`, WinoGrande is scored by partial evaluation: each choice fills the gap of its own context, and
the sentence's rest is the continuation. Other shipped sets score the choice or its letter, which is another measure.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tailored_llama.config import FEW_SHOTS, BenchmarkConfig, RunConfig, Work, is_json, is_written
from tailored_llama.data.benchmarks import UNLABELLED, Example, read_examples
from tailored_llama.data.chat import answer_end, find_chat, frozen, named_example, write_chat
from tailored_llama.data.drawing import select_evaluation, select_train, without
from tailored_llama.data.schema import find_schema
from tailored_llama.data.settings import PromptSettings
from tailored_llama.data.splits import PURPOSE
from tailored_llama.data.templates import LETTERS, Layout, Template, layout_of, load_template, names_in
from tailored_llama.data.turns import Turns, find_turns
from tailored_llama.errors import InputError
from tailored_llama.store import read_table, write_table

PromptSplit = Literal["shots", "held_out", "selection", "evaluation"]

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
        ("is_ended", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """One example written out: a context and a continuation per choice, the right choice, the lengths for acc_norm.

    The space between the two belongs to the continuation. A length is the number of characters of the continuation
    without it, by which lm-evaluation-harness divides for acc_norm. If a base's chat template asks, `end` is the token
    after an answer, and `messages` are what it asks, as JSON. `is_ended` says whether the model ends its answer itself.
    """

    example: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int
    choice_lengths: tuple[int, ...]
    end: str = ""
    messages: str = ""
    is_ended: bool = False

    @property
    def solved(self) -> str:
        """The prompt with its right answer."""
        return self.contexts[self.answer] + self.continuations[self.answer]


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
    start = header or _opening(layout)
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


def is_ended(benchmark: BenchmarkConfig, template: Template, examples: Iterable[Example], in_turns: bool) -> bool:
    """Tell whether a model ends its answers itself: they are written, or all rows of a benchmark offer the same ones.

    Then the end of text is tuned, and a chat can ask for them. Choices that differ by row are ranked. `in_turns`: a
    base's chat template asks, after which the choices follow as they are.
    """
    layout = layout_of(template, benchmark)
    if in_turns or names_in(layout.continuation) <= {"choice", "letter"}:
        examples = {frozenset(example.choices): example for example in examples}.values()  # one of each is enough
    offered = {
        frozenset(own if in_turns else _fill(template, layout, example, i)[2] for i, own in enumerate(example.choices))
        for example in examples
    }
    return is_written(benchmark) or len(offered) == 1


def few_shot_header(benchmark: BenchmarkConfig, template: Template, examples: Sequence[Example]) -> str:
    """An instruction, once, and solved examples, each followed by a blank line, as lm-evaluation-harness joins them."""
    if not examples:
        return ""
    layout = layout_of(template, benchmark)
    solved = ["".join(_fill(template, layout, example, example.answer)) for example in examples]
    return _opening(layout) + "".join(f"{text}\n\n" for text in solved)


def _opening(layout: Layout) -> str:
    return f"{layout.instruction}\n\n" if layout.instruction else ""


def _fill(template: Template, layout: Layout, example: Example, choice: int) -> tuple[str, str, str]:
    """Context, delimiter and continuation of one choice."""
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
    delimiter = "" if layout.layout.endswith("\n") else " "
    return layout.layout.format(**values), delimiter, layout.continuation.format(**values)


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
    every = (example for part in PURPOSE for example in read_examples(examples, part))
    ends = is_ended(benchmark, template, every, turns is not None)
    if turns and (shown := settings.draw.num_fewshot):
        allowed = "0 for rows that the base's chat template asks"
        raise InputError(f"scoring.num_fewshot: got {shown} with {benchmark.name}; allowed: {allowed}")
    solved, chosen = _choose(examples, settings)
    header = few_shot_header(benchmark, template, solved)
    prompts = [
        replace(render(benchmark, template, example, header, settings.ending, turns), is_ended=ends)
        for members in chosen.values()
        for example in members
    ]
    columns = {field.name: [getattr(p, field.name) for p in prompts] for field in fields(Prompt) if field.name != "end"}
    splits = [name for name, members in chosen.items() for _ in members]
    columns |= {"split": splits, "template": [template.name] * len(prompts)}
    write_table(work.out / "prompts.parquet", columns, PROMPTS_SCHEMA)
    named = render(benchmark, template, named_example(benchmark), header, turns=turns)
    asked, *others = ((prompt.contexts, prompt.continuations) for prompt in (named, *prompts))
    of_base = {"template": turns.template, "end": turns.end} if turns else {}
    chat = find_chat(benchmark, asked, others, ends, **of_base)
    if chat and is_json(benchmark):
        chat = replace(chat, schema=find_schema([e.choices[e.answer] for e in read_examples(examples, "train")]))
    write_chat(work.out, chat)
    return {name: len(members) for name, members in chosen.items()}


def _choose(examples: Path, settings: PromptSettings) -> tuple[list[Example], dict[PromptSplit, list[Example]]]:
    """The solved examples before each question, and the examples to render by split."""
    draw, count = settings.draw, settings.count
    train = read_examples(examples, "train") if settings.split == "train" or draw.num_fewshot else []
    solved, shots, held_out = draw_train(settings, train)
    if settings.split == "evaluation":
        return solved, {"evaluation": select_evaluation(read_examples(examples, "evaluation"), count)}
    if settings.split == "train":
        return solved, {"shots": shots, "held_out": held_out}
    rest = read_examples(examples, "selection")
    if (count := len(rest) if count is None else count) > len(rest):
        name = settings.wording.benchmark.name
        raise InputError(f"examples: got {count}; allowed: at most {len(rest)} ({name} has so many to choose with)")
    # Answers are not balanced, because those of the split that results are reported on are not either.
    labelled = [example for example in rest if example.answer != UNLABELLED]
    chosen = random.Random(draw.seed).sample(labelled, min(count, len(labelled)))
    others = [example for example in rest if example.answer == UNLABELLED]
    return solved, {"selection": chosen + others[: count - len(chosen)]}


def draw_train(settings: PromptSettings, train: Sequence[Example]) -> tuple[list[Example], ...]:
    """The solved examples before each question, the shots and the held-out examples, of a benchmark's train split.

    The size of a divided file's train part varies with its rows. If too few are left beside the shots, fewer are held
    out, at least one. InputError: more are requested than the split holds.
    """
    draw, name, divided = settings.draw, settings.wording.benchmark.name, settings.wording.benchmark.data
    if draw.num_fewshot > len(train):
        allowed = f"at most {len(train)} (examples in the train split of {name})"
        raise InputError(f"scoring.num_fewshot: got {draw.num_fewshot}; allowed: {allowed}")
    solved, _ = select_train(train, draw.num_fewshot, 0, draw.seed, benchmark=name)
    pool = without(train, solved)
    shots = _affordable(settings, solved, pool) if draw.shots is None else draw.shots
    count = min(draw.held_out, max(len(pool) - shots, 1)) if divided else draw.held_out
    if draw.shots is None and shots + count <= len(pool):
        # First, and unbalanced: nearly all rows are shots, and would leave only the commonest answers to hold out.
        held_out = random.Random(draw.seed).sample(pool, count)
        return solved, select_train(without(pool, held_out), shots, 0, draw.seed, benchmark=name)[0], held_out
    return solved, *select_train(pool, shots, count, draw.seed, benchmark=name)


def _affordable(settings: PromptSettings, solved: Sequence[Example], pool: Sequence[Example]) -> int:
    """How many examples have the tokens of the settings, by their mean. All but the first 50 leave some to hold out.

    Messages are counted as they are, so that bases with different chat templates read the same.
    """
    benchmark, template = settings.wording.benchmark, load_template(settings.wording.template)
    header, some = few_shot_header(benchmark, template, solved), select_evaluation(pool, 1000)

    def size(example: Example) -> int:
        if messages := example.fields.get("messages"):
            return len((messages + example.choices[example.answer]).encode())
        return len(render(benchmark, template, example, header).solved.encode())

    most = max(len(pool) - settings.draw.held_out, min(FEW_SHOTS, len(pool) - 1))
    return max(1, min(most, settings.draw.tokens * BYTES_A_TOKEN * len(some) // max(sum(map(size, some)), 1)))


def read_prompts(folder: Path, split: PromptSplit) -> list[Prompt]:
    """The prompts of one split, as `render_prompts` wrote them; empty if it wrote none."""
    table, end = read_table(folder / "prompts.parquet", PROMPTS_SCHEMA), answer_end(folder)
    rows = table.filter(pc.equal(table["split"], split)).drop_columns(["split", "template"]).to_pylist()
    return [Prompt(**{name: frozen(value) for name, value in row.items()}, end=end) for row in rows]


def rows_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what prompts ask, offer and accept, in their order: the same for the same rows, wherever they are."""
    rows = [[prompt.contexts, prompt.continuations, prompt.answer] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
