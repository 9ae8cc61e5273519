"""Prompts: how an example is written out, for tuning and for scoring alike.

The wording is a template set's (`templates.py`), and one renderer fills it in. The space between context and
continuation belongs to the continuation.

With the set `harness`, WinoGrande is scored by partial evaluation: each choice stands in the gap of its own context,
and the same rest of the sentence is the continuation. With the other shipped sets the choice itself is scored, or its
letter; a sentence read twice, for one, would give the rest away. These accuracies are different measures.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tailored_llama.artifacts import read_table, write_table
from tailored_llama.benchmarks import Example, read_examples
from tailored_llama.config import BenchmarkConfig
from tailored_llama.errors import InputError
from tailored_llama.own import is_written, stop_strings
from tailored_llama.templates import LETTERS, Layout, Template, layout_of, load_template

PromptSplit = Literal["shots", "held_out", "selection", "evaluation"]

PROMPTS_SCHEMA = pa.schema(
    [
        ("example", pa.int32()),
        ("split", pa.string()),
        ("contexts", pa.list_(pa.string())),
        ("continuations", pa.list_(pa.string())),
        ("answer", pa.int32()),
        ("choice_lengths", pa.list_(pa.int32())),
        ("template", pa.string()),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """One example written out: a context and a continuation per choice, the right choice, the lengths of acc_norm.

    The contexts are equal but where the choice stands in the context (WinoGrande with the harness template). A length
    is the number of characters of the continuation without its leading space: what lm-evaluation-harness divides by
    in the five benchmarks it reports acc_norm for. Where letters are scored, all lengths are 1, and acc_norm is acc.
    """

    example: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int
    choice_lengths: tuple[int, ...]


def render(
    benchmark: BenchmarkConfig, template: Template, example: Example, header: str = "", ending: str = ""
) -> Prompt:
    """Write one example out.

    Args:
        header: solved examples from `few_shot_header`, put before the question. They bring the instruction with
            them, so it is written once.
        ending: what follows every continuation.

    Raises:
        InputError: the template cannot word this benchmark, or has too few letters for the choices.
    """
    layout = layout_of(template, benchmark)
    start = header or _opening(layout)
    parts = [_fill(template, layout, example, choice) for choice in range(len(example.choices))]
    return Prompt(
        example=example.index,
        contexts=tuple(start + context for context, _ in parts),
        continuations=tuple(continuation + ending for _, continuation in parts),
        answer=example.answer,
        choice_lengths=tuple(len(continuation) - 1 for _, continuation in parts),
    )


def few_shot_header(benchmark: BenchmarkConfig, template: Template, examples: Sequence[Example]) -> str:
    """Solved examples, each followed by a blank line, as lm-evaluation-harness joins them; "" for none.

    An instruction stands once, at the top.
    """
    if not examples:
        return ""
    layout = layout_of(template, benchmark)
    solved = ("".join(_fill(template, layout, example, example.answer)) + "\n\n" for example in examples)
    return _opening(layout) + "".join(solved)


def _opening(layout: Layout) -> str:
    """The instruction and a blank line."""
    return f"{layout.instruction}\n\n" if layout.instruction else ""


def _fill(template: Template, layout: Layout, example: Example, choice: int) -> tuple[str, str]:
    """Context and continuation of one choice."""
    values: dict[str, Any] = {**example.fields, "choice": example.choices[choice], "choices": example.choices}
    if {"listed", "letter"} & (layout.in_context | layout.in_continuation):
        if len(example.choices) > len(LETTERS):
            raise InputError(
                f"example {example.index}: got {len(example.choices)} choices; allowed: at most {len(LETTERS)}, which "
                f"the template {template.name} letters"
            )
        lettered = zip(LETTERS, example.choices, strict=False)
        values["listed"] = "\n".join(template.shown.format(letter=letter, choice=text) for letter, text in lettered)
        values["letter"] = LETTERS[choice]
    return layout.layout.format(**values), " " + layout.continuation.format(**values)


def select_train(
    examples: Sequence[Example], shots: int, held_out: int, seed: int, *, benchmark: str
) -> tuple[list[Example], list[Example]]:
    """Draw the shots and the held-out examples from the train split, by seed, without overlap.

    Each draw takes as equally many examples of every answer index as the split has, in shuffled order. The shots do
    not depend on how many are held out.

    Args:
        benchmark: its name, for the error message.

    Raises:
        InputError: more examples are asked for than the split holds.
    """
    size = len(examples)
    if shots + held_out > size:
        field, got, other, taken = "shots", shots, "held_out", held_out
        if held_out >= size:
            field, got, other, taken = "held_out", held_out, "shots", shots
        raise InputError(
            f"tuning.{field}: got {got}; allowed: at most {max(size - taken, 0)} ({benchmark} has {size} train "
            f"examples to draw from, and tuning.{other} is {taken})"
        )
    generator = random.Random(seed)
    remaining: dict[int, list[Example]] = {}
    for example in examples:
        remaining.setdefault(example.answer, []).append(example)
    for label in sorted(remaining):
        generator.shuffle(remaining[label])
    return _draw(remaining, shots, generator), _draw(remaining, held_out, generator)


def _draw(remaining: dict[int, list[Example]], count: int, generator: random.Random) -> list[Example]:
    """Take `count` examples out of `remaining`, one of every label in turn while it lasts."""
    drawn: list[Example] = []
    while len(drawn) < count:
        labels = sorted(label for label, examples in remaining.items() if examples)
        generator.shuffle(labels)  # which labels get one more, where the count does not divide evenly
        drawn += [remaining[label].pop() for label in labels[: count - len(drawn)]]
    generator.shuffle(drawn)
    return drawn


def _select_at_random(examples: Sequence[Example], count: int, seed: int, *, benchmark: str) -> list[Example]:
    """Examples as the split has them, not balanced: what is chosen on them is reported on a split that is not either.

    Raises:
        InputError: there are fewer.
    """
    if count > len(examples):
        raise InputError(
            f"examples: got {count}; allowed: at most {len(examples)} ({benchmark} has so many train examples that are "
            "neither tuned on, nor held out, nor solved before each question)"
        )
    return random.Random(seed).sample(examples, count)


def _without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    used = {example.index for example in others}
    return [example for example in examples if example.index not in used]


def select_evaluation(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """`limit` examples evenly spaced over the split, the first among them, in order; all where it has no more.

    The first rows of a split need not be like the rest: HellaSwag's first 3,243 are all of ActivityNet.
    """
    size = len(examples)
    if limit is None or limit >= size:
        return list(examples)
    return [examples[i * size // limit] for i in range(limit)]


def render_prompts(
    examples_folder: Path,
    benchmark: BenchmarkConfig,
    split: Literal["train", "selection", "evaluation"],
    template: str,
    out: Path,
    *,
    shots: int = 0,
    held_out: int = 0,
    selection: int = 0,
    limit: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Stage: write `prompts.parquet`, and its first prompts for people to read as `samples.txt`.

    The solved examples before each question are drawn first, from the train split by seed, and are the same for every
    question, in tuning and in scoring (in lm-evaluation-harness that is the `first_n` sampler; its default draws
    others for every document). None of them is among the shots or the held-out examples, nor, as the train split
    leaves those out, in the evaluation split.

    Args:
        examples_folder: what `benchmarks.load_benchmark` wrote.
        split: train renders `shots` and `held_out`; selection renders `selection` further train examples, drawn at
            random, to choose a template on; evaluation renders `limit` evenly spaced examples.
        template: a shipped template set's name, or the path of a file.

    Returns:
        The number of prompts of each split.

    Raises:
        InputError: more train examples are asked for than there are, or the template cannot word this benchmark.
    """
    wording = load_template(template)
    chosen: dict[PromptSplit, list[Example]] = {}
    train = read_examples(examples_folder, "train") if split != "evaluation" or num_fewshot else []
    if num_fewshot > len(train):
        raise InputError(
            f"scoring.num_fewshot: got {num_fewshot}; allowed: at most {len(train)} "
            f"(examples in the train split of {benchmark.name})"
        )
    solved, _ = select_train(train, num_fewshot, 0, seed, benchmark=benchmark.name)
    if split == "evaluation":
        chosen["evaluation"] = select_evaluation(read_examples(examples_folder, "evaluation"), limit)
    else:
        pool = _without(train, solved)
        tuned, kept = select_train(pool, shots, held_out, seed, benchmark=benchmark.name)
        if split == "train":
            chosen |= {"shots": tuned, "held_out": kept}
        else:
            rest = _without(pool, tuned + kept)
            chosen["selection"] = _select_at_random(rest, selection, seed, benchmark=benchmark.name)
    header = few_shot_header(benchmark, wording, solved)
    # A model that writes its answer must learn where to stop.
    ending = stop_strings(benchmark)[0] if split == "train" and is_written(benchmark) else ""
    rows = [
        (name, render(benchmark, wording, example, header, ending))
        for name, examples in chosen.items()
        for example in examples
    ]
    columns = {
        "example": [prompt.example for _, prompt in rows],
        "split": [name for name, _ in rows],
        "contexts": [prompt.contexts for _, prompt in rows],
        "continuations": [prompt.continuations for _, prompt in rows],
        "answer": [prompt.answer for _, prompt in rows],
        "choice_lengths": [prompt.choice_lengths for _, prompt in rows],
        "template": [wording.name] * len(rows),
    }
    write_table(out / "prompts.parquet", columns, PROMPTS_SCHEMA)
    written = is_written(benchmark)
    shown = "An accepted answer" if written else "A continuation, which is what is scored,"
    title = f"{benchmark.name}, template {wording.name}. {shown} stands in ⟦ ⟧.\n"
    samples = [_sample(name, prompt, written) for name, prompt in rows[:3]]
    (out / "samples.txt").write_text("\n".join([title, *samples]), encoding="utf-8")
    return {name: len(examples) for name, examples in chosen.items()}


def _sample(split: str, prompt: Prompt, written: bool) -> str:
    """One prompt as text for people: the context once where the choices share it."""
    lines = [f"──── {split}, example {prompt.example} ────"]
    previous = None
    for i, (context, continuation) in enumerate(zip(prompt.contexts, prompt.continuations, strict=True)):
        if context != previous:
            lines.append(context)
        previous = context
        kind, right = ("accepted", "") if written else (f"choice {i}", "  ← right" if i == prompt.answer else "")
        lines.append(f"    {kind}: ⟦{continuation}⟧{right}")
    return "\n".join(lines) + "\n"


def read_prompts(folder: Path, split: PromptSplit) -> list[Prompt]:
    """The prompts of one split, as `render_prompts` wrote them; none where it wrote none of that split."""
    table = read_table(folder / "prompts.parquet", PROMPTS_SCHEMA)
    return [
        Prompt(
            example=row["example"],
            contexts=tuple(row["contexts"]),
            continuations=tuple(row["continuations"]),
            answer=row["answer"],
            choice_lengths=tuple(row["choice_lengths"]),
        )
        for row in table.filter(pc.equal(table["split"], split)).to_pylist()
    ]
