"""Is pruning worth it beside quantisation? Checkpoints in several types: bytes, accuracy and speed.

    python tests/performance/bits.py dense=FOLDER pruned=FOLDER ['dense OTHER=FOLDER' …] [--type f16 --type q8_0] \
        [--torch bfloat16 --torch int8] [--benchmark arc_easy] [--limit 200] [--out FOLDER]

A `--type` is a GGUF type and runs in llama.cpp. A `--torch` runs in transformers: bfloat16, float32, or int8 (weights
only, by torchao: pip install torchao). `--out` gets `bits.parquet`, `bits.md` and `bits.png`.

Accuracy is acc_norm on evenly spaced documents, with its standard error. Chance-corrected it is (accuracy − floor) ÷
(accuracy of the reference − floor), with a 95 % interval from a bootstrap over the documents that both answered. The
reference is the first row, or the first one of the last model before it whose label begins with `dense`. Speeds
are medians of `--repetitions`, in turns over all rows: tokens per second of a prompt of 256 tokens, and of 32 tokens
generated after it one by one.
"""

import importlib.metadata
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from transformers import AutoModelForCausalLM, TorchAoConfig

from llama_cpp import LlamaCpp, llama_cpp
from tailored_llama.config import Work, as_gguf_type, validate_config
from tailored_llama.data import Prompt, encode_prompt, load_template, loglikelihoods, render
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.data.drawing import select_evaluation
from tailored_llama.evaluation.scoring import choice_floor
from tailored_llama.evaluation.statistics import Answers, chance_corrected, interval, paired_draws, ratios
from tailored_llama.models import context_length, encode_pair, load_tokenizer, weight_files
from tailored_llama.reports.figures import COLOURS, STYLE, Picture, new_figure
from tailored_llama.reports.parts import number, percent, share_cell
from tailored_llama.serving import measure_speed, read_speed, write_gguf
from tailored_llama.store import write_rows

CONTEXT, PROMPT, GENERATED = 1024, 256, 32
MARKERS = "osD^vPX*"
SERIES = [COLOURS[name] for name in ("dense", "pruned", "tailored", "line-1", "line-2", "line-3")]


@dataclass(frozen=True)
class Row:
    """One row of `bits.parquet`: a model in a type. Accuracies and their ratios are fractions."""

    model: str
    runtime: str  # with its version
    type: str
    bytes: int  # of its weights on disk
    benchmark: str
    documents: int
    floor: float
    accuracy: float
    stderr: float
    chance_corrected: float
    cc_low: float
    cc_high: float
    prompt_tokens_per_second: float
    generated_tokens_per_second: float


@dataclass(frozen=True)
class Candidate:
    """A model in a type, ready to be measured. `score` gives the summed log-likelihood of every choice."""

    model: str
    runtime: str
    type: str
    bytes: int
    score: Callable[[Sequence[Prompt]], list[list[float]]]
    speed: Callable[[], tuple[float, float]]


def main(
    checkpoints: list[str],
    types: Annotated[list[str], typer.Option("--type")] = ["f16", "q8_0", "q4_k_m"],  # noqa: B006  typer's form
    torch_types: Annotated[list[str], typer.Option("--torch")] = [],  # noqa: B006
    benchmark: str = "arc_easy",
    limit: int = 200,
    repetitions: int = 5,
    out: Path | None = None,
) -> None:
    run = validate_config({"benchmarks": [benchmark]})
    examples = load_examples(run.benchmarks[0], "evaluation", run.store.downloads)
    template = load_template("harness")
    prompts = [render(run.benchmarks[0], template, example) for example in select_evaluation(examples, limit)]
    with tempfile.TemporaryDirectory() as scratch:
        candidates = []
        for given in checkpoints:
            label, _, folder = given.partition("=")
            candidates += [in_llama_cpp(label, Path(folder), name, Path(scratch)) for name in types]
            candidates += [in_transformers(label, Path(folder), name, Path(scratch)) for name in torch_types]
        answers = [answers_of(prompts, candidate.score(prompts)) for candidate in candidates]
        speeds: list[list[tuple[float, float]]] = [[] for _ in candidates]
        for _ in range(repetitions):
            for values, candidate in zip(speeds, candidates, strict=True):
                values.append(candidate.speed())
    rows: list[Row] = []
    for one, found, times in zip(candidates, answers, speeds, strict=True):
        if not rows or (one.model.startswith("dense") and one.model != rows[-1].model):
            reference = found
        rows.append(row(one, benchmark, choice_floor(prompts), found, reference, times))
    text = table(rows)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / "bits.parquet", rows, Row)
        (out / "bits.md").write_text(text + "\n")
        picture(rows).save_png(out / "bits.png")


def in_llama_cpp(label: str, checkpoint: Path, name: str, scratch: Path) -> Candidate:
    """A checkpoint as a GGUF file in llama.cpp. A context that several choices share is computed once."""
    path, tokenizer = scratch / f"{label}-{name}" / "model.gguf", load_tokenizer(checkpoint)
    path.parent.mkdir()
    write_gguf(checkpoint, gguf_type=as_gguf_type(name), out=path)

    def score(prompts: Sequence[Prompt]) -> list[list[float]]:
        with llama_cpp(path, CONTEXT) as runtime:
            return [choice_scores(runtime, tokenizer, prompt) for prompt in prompts]

    def speed() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as out:
            measure_speed(path.parent, settings=None, work=Work(Path(out)))
            seconds = read_speed(Path(out))
        return 1 / seconds["reading"], 1 / seconds["writing"]

    version = importlib.metadata.version("llama-cpp-py-sync")
    return Candidate(label, f"llama-cpp-py-sync {version}", name, path.stat().st_size, score, speed)


def choice_scores(runtime: LlamaCpp, tokenizer: Any, prompt: Prompt) -> list[float]:
    """Summed log-likelihood of every choice."""
    scores, before = [], None
    for text, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        context, ids = encode_pair(tokenizer, text, continuation)
        context = context[-(CONTEXT - len(ids)) :]
        if context != before:
            before, first = context, runtime.logits(context)[-1:]
        runtime.forget(len(context))
        rows = torch.cat([first, runtime.extend(ids[:-1], len(context))]) if ids[1:] else first
        scores.append(float(rows.log_softmax(-1)[range(len(ids)), torch.tensor(ids)].sum()))
    return scores


def in_transformers(label: str, checkpoint: Path, name: str, scratch: Path) -> Candidate:
    """A checkpoint in transformers, scored in packed rows."""
    runtime = f"transformers {importlib.metadata.version('transformers')}"
    folder = scratch / f"{label}-{name}"
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        runtime += f", torchao {importlib.metadata.version('torchao')}"
        settings = TorchAoConfig(Int8WeightOnlyConfig())
        options = {"dtype": torch.bfloat16, "quantization_config": settings, "device_map": "cpu"}
    else:
        options = {"dtype": getattr(torch, name)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
    model.save_pretrained(folder)
    size = sum(file.stat().st_size for file in weight_files(folder))
    tokenizer = load_tokenizer(checkpoint)

    def score(prompts: Sequence[Prompt]) -> list[list[float]]:
        return loglikelihoods(model, [encode_prompt(tokenizer, p, context_length(model)) for p in prompts], CONTEXT)

    def speed() -> tuple[float, float]:
        cache: Any = None

        def step(ids: list[int]) -> None:
            nonlocal cache
            output = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
            cache = output.past_key_values

        with torch.inference_mode():
            return timed(step, lambda position: step([7]))

    return Candidate(label, runtime, name, size, score, speed)


def timed(read: Callable[[list[int]], Any], write: Callable[[int], Any]) -> tuple[float, float]:
    """Tokens per second of a prompt, and of tokens generated after it."""
    ids = np.random.default_rng(0).integers(5, 1000, PROMPT).tolist()
    start = time.perf_counter()
    read(ids)
    middle = time.perf_counter()
    for position in range(PROMPT + 1, PROMPT + 1 + GENERATED):
        write(position)
    return PROMPT / (middle - start), GENERATED / (time.perf_counter() - middle)


def answers_of(prompts: Sequence[Prompt], scores: Sequence[Sequence[float]]) -> Answers:
    """Whether the choice with the highest log-likelihood per character is the right one, for every prompt."""
    right = [
        float(int(np.argmax(np.array(own) / np.array(prompt.choice_lengths))) == prompt.answer)
        for prompt, own in zip(prompts, scores, strict=True)
    ]
    return Answers(
        np.array([prompt.example for prompt in prompts]),
        np.array([prompt.answer for prompt in prompts]),
        np.array(right),
    )


def row(
    one: Candidate,
    benchmark: str,
    floor: float,
    found: Answers,
    reference: Answers,
    speeds: Sequence[tuple[float, float]],
) -> Row:
    accuracy = float(found.values.mean())
    low, high = interval(ratios(*paired_draws(found, reference), floor))
    return Row(
        one.model,
        one.runtime,
        one.type,
        one.bytes,
        benchmark,
        len(found.values),
        floor,
        accuracy,
        float(found.values.std(ddof=1)) / len(found.values) ** 0.5,
        chance_corrected(accuracy, float(reference.values.mean()), floor),
        low,
        high,
        *(statistics.median(values) for values in zip(*speeds, strict=True)),
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"| model | runtime | type | MB | {rows[0].benchmark} | chance-corrected (95 %) | prompt tokens/s "
        "| generated tokens/s |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for one in rows:
        corrected = share_cell(one.chance_corrected, one.cc_low, one.cc_high).brief
        if one == rows[0]:
            corrected = percent(1, 0)
        if not math.isfinite(one.chance_corrected):
            corrected = "–"  # the reference itself has nothing above the floor
        lines.append(
            f"| {one.model} | {one.runtime.split()[0]} | {one.type} | {one.bytes / 1e6:.0f} "
            f"| {number(one.accuracy)} ± {number(one.stderr)} | {corrected} "
            f"| {one.prompt_tokens_per_second:.0f} | {one.generated_tokens_per_second:.0f} |"
        )
    runtimes = "; ".join(dict.fromkeys(one.runtime for one in rows))
    return "\n".join([*lines, "", f"Floor {rows[0].floor:.3f}, {rows[0].documents} documents; {runtimes}."])


def picture(rows: Sequence[Row]) -> Picture:
    """Chance-corrected accuracy with 95 % intervals against bytes and against both speeds."""
    models, types = (list(dict.fromkeys(getattr(one, name) for one in rows)) for name in ("model", "type"))
    panels = {
        "megabytes of weights": lambda one: one.bytes / 1e6,
        "prompt tokens/s": lambda one: one.prompt_tokens_per_second,
        "generated tokens/s": lambda one: one.generated_tokens_per_second,
    }
    low, high = limits(rows)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(360)
        for axes, (name, x) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            for one in rows:
                colour, marker = SERIES[models.index(one.model)], MARKERS[types.index(one.type)]
                bounds = [max(one.cc_low, low), min(one.cc_high, high)]  # an unbounded one ends at the frame
                axes.vlines(x(one), *bounds, colors=colour, linewidth=1.2)
                filled = colour if one.runtime.startswith("llama") else "white"
                axes.plot(x(one), one.chance_corrected, marker, color=colour, markerfacecolor=filled, markersize=8)
            axes.set_xlabel(name)
            axes.set_xlim(0, 1.08 * max(map(x, rows)))
            axes.set_ylim(low, high)
            axes.axhline(0, color=COLOURS["ink"], linestyle=(0, (4, 2)), linewidth=1.2)
            axes.yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
            axes.grid(axis="y")
        figure.axes[0].set_ylabel("accuracy above the floor")
        handles = [Line2D([], [], color=SERIES[i], linewidth=4, label=model) for i, model in enumerate(models)]
        for i, kind in enumerate(types):
            runtime = next(one.runtime for one in rows if one.type == kind)
            handles.append(
                Line2D(
                    [], [], color=COLOURS["ink"], linestyle="none", marker=MARKERS[i], markersize=8, label=kind,
                    markerfacecolor=COLOURS["ink"] if runtime.startswith("llama") else "white",
                )
            )  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderpad=0)
        return Picture(figure, "Accuracy above the floor against bytes and against tokens per second")


def limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The range of the vertical axis: all points, and their intervals as far as they are of use."""
    known = [value for one in rows for value in (one.chance_corrected, one.cc_low, one.cc_high) if math.isfinite(value)]
    return max(-1.0, min([*known, 0.0]) - 0.05), min(2.0, max(known) + 0.05)


if __name__ == "__main__":
    typer.run(main)
