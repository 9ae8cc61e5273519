"""How near this library comes to the rate of a device's matrix products, and what its peers do with the same work.

    python tests/performance/speed.py FOLDER smollm2-135m-instruct [--device cpu] [--threads 2] [--work scoring]

The works: LoRA tuning on 50 shots of ARC-easy and of HellaSwag (rank 8, all projections, batch 4), scoring both,
perplexity, and importance. All in bfloat16. Each round runs every work once and its peers after it, so that a busy
machine slows all of them; the figures are medians over the rounds. Peers are Hugging Face's Trainer with PEFT
(`all-linear`; its adapters stay in float32, or are computed under autocast), lm-eval's HFLM, and llama.cpp's reading of
a prompt (BF16). Those that are not installed are left out.

Tokens/s count the distinct tokens of the work, for peers too: the same work, however often they read a context.
`share` is of the rate of this model's own projections, timed on 512 tokens before and after each work, with
2 FLOPs a parameter and token in a forward pass, 4 for LoRA (no gradients of weights), 6 for all weights. `needed`
counts the head only at positions whose logits are needed, as it is computed. Models are kept in FOLDER.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import linear

from common import kept_in
from tailored_llama.config import ExecutionConfig, RunConfig, Work, load_config
from tailored_llama.data import (
    Prompt,
    encode_prompt,
    find_text,
    load_texts,
    loglikelihoods,
    read_calibration,
    read_prompts,
)
from tailored_llama.evaluation.perplexity import rolling_windows, token_losses
from tailored_llama.models import context_length, first_token, load_model, load_tokenizer, pick_device, token_budget
from tailored_llama.pipeline import stages, steps
from tailored_llama.progress import silent
from tailored_llama.pruning import ImportanceSettings
from tailored_llama.pruning.importance import score_importance
from tailored_llama.serving import GgufSettings, export_gguf, measure_speed, read_speed
from tailored_llama.training import TuneSettings, tune
from tailored_llama.training.tuning import encode_sample

WORKS = ("tuning arc_easy", "tuning hellaswag", "scoring", "perplexity", "importance")
SETTINGS = [
    'benchmarks=["arc_easy", "hellaswag"]',
    "model.dtype=bfloat16",
    "tuning.held_out=0",
    "tuning.precision=bfloat16",
    "calibration.samples=4",
    'perplexity.source="boolq"',
    "perplexity.tokens=4096",
]
RATE_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """A work: its distinct tokens, positions that need logits, FLOPs a parameter and token; and who does it.

    Each of `runs` does it once and returns its seconds; the first is this library.
    """

    tokens: int
    positions: int
    flops: int
    runs: dict[str, Callable[[], float]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """The dense checkpoint, its model, and the artifacts that the works read."""

    config: RunConfig
    checkpoint: Path
    train: dict[str, Path]
    evaluation: dict[str, Path]
    groups: Path
    calibration: Path
    execution: ExecutionConfig
    model: Any
    tokenizer: Any


def finished(device: torch.device) -> float:
    """The time at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(bench: Bench, function: Callable[[], Any]) -> float:
    start = finished(bench.model.device)
    function()
    return finished(bench.model.device) - start


def matrix_rate(model: Any) -> float:
    """FLOP/s of all projections of the layers, one after another, on random inputs in bfloat16."""
    weights = [module.weight for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {n: torch.randn(RATE_TOKENS, n, device=model.device).bfloat16() for n in {w.shape[1] for w in weights}}
    with torch.inference_mode():
        start = finished(model.device)
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        return 2 * RATE_TOKENS * sum(w.numel() for w in weights) / (finished(model.device) - start)


def tuning(bench: Bench, name: str, epochs: int) -> Row:
    settings = TuneSettings.of(bench.config, [name])
    shots = read_prompts(bench.train[name], "shots")[: settings.shots]
    samples = [encode_sample(bench.tokenizer, context_length(bench.model), None, prompt) for prompt in shots]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as out:
            work = Work(Path(out), bench.execution)
            measured = tune(bench.checkpoint, {name: bench.train[name]}, settings=settings, work=work)
        return float(measured["tokens"] / measured["tokens_per_second"])

    rows = [[*s.encoded.document.prefix, s.encoded.targets[0][-1]] for s in samples]
    labels = [
        [-100] * (len(ids) - len(s.encoded.targets[0])) + [*s.encoded.targets[0]]
        for ids, s in zip(rows, samples, strict=True)
    ]
    peers = {
        "Trainer + PEFT": partial(train_with_hf, bench, rows, labels, epochs, False),
        "Trainer + PEFT, autocast": partial(train_with_hf, bench, rows, labels, epochs, True),
    }
    positions = sum(len(s.encoded.targets[0]) for s in samples)
    return Row(epochs * sum(map(len, samples)), epochs * positions, 4, {"ours": ours, **peers})


def train_with_hf(
    bench: Bench, rows: Sequence[list[int]], labels: Sequence[list[int]], epochs: int, autocast: bool
) -> float:
    """Seconds of Trainer with PEFT on padded batches of four, with the settings of `tune`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in batch]) for k, v in padding.items()}

    tuned = bench.config.tuning
    model = AutoModelForCausalLM.from_pretrained(bench.checkpoint, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=tuned.rank, lora_alpha=tuned.alpha, target_modules="all-linear"))
    data = [
        {"input_ids": ids, "labels": own, "attention_mask": [1] * len(ids)}
        for ids, own in zip(rows, labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            per_device_train_batch_size=tuned.batch_size,
            num_train_epochs=epochs,
            learning_rate=tuned.learning_rate,
            bf16=autocast,
            use_cpu=bench.model.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collate, data)
        return timed(bench, trainer.train)


def scoring(bench: Bench, documents: int) -> Row:
    asked: list[Prompt] = []
    for folder in bench.evaluation.values():
        prompts = read_prompts(folder, "evaluation")
        asked += [prompts[i * len(prompts) // documents] for i in range(documents)]
    encoded = [encode_prompt(bench.tokenizer, prompt, context_length(bench.model)) for prompt in asked]
    runs = {"ours": partial(loglikelihoods, bench.model, encoded, token_budget(None, bench.model))}
    if find_spec("lm_eval"):
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=16)
        pairs = [pair for prompt in asked for pair in zip(prompt.contexts, prompt.continuations, strict=True)]
        instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        runs["HFLM, batch 16"] = partial(lm.loglikelihood, instances, disable_tqdm=True)
    positions = sum(len({p for choice in item.positions for p in choice}) for item in encoded)
    timers = {name: partial(timed, bench, run) for name, run in runs.items()}
    return Row(sum(len(item.document) for item in encoded), positions, 2, timers)


def perplexity(bench: Bench) -> Row:
    settings, model = bench.config.perplexity, bench.model
    text = "\n\n".join(load_texts(find_text(settings), bench.config.store.downloads))[: settings.tokens * 32]
    ids = bench.tokenizer.encode(text, add_special_tokens=False)[: settings.tokens]
    windows = rolling_windows(len(ids), settings.window)
    first, budget = first_token(bench.tokenizer), token_budget(None, model)
    runs = {"ours": partial(timed, bench, partial(token_losses, model, first, ids, windows, budget, silent))}
    if find_spec("llama_cpp_py_sync"):
        runs["llama.cpp, reading"] = partial(read_with_llama_cpp, bench, len(ids))
    return Row(len(ids), len(ids), 2, runs)


def read_with_llama_cpp(bench: Bench, tokens: int) -> float:
    with tempfile.TemporaryDirectory() as out:
        export_gguf(bench.checkpoint, settings=GgufSettings("bf16", "model"), work=Work(Path(out)))
        measure_speed(Path(out), settings=None, work=Work(Path(out)))
        return read_speed(Path(out))["reading"] * tokens


def importance(bench: Bench) -> Row:
    def ours() -> None:
        with tempfile.TemporaryDirectory() as out:
            work = Work(Path(out), bench.execution)
            settings = ImportanceSettings.of(bench.config)
            score_importance(bench.checkpoint, bench.groups, bench.calibration, settings=settings, work=work)

    tokens = read_calibration(bench.calibration).numel()
    return Row(tokens, tokens, 6, {"ours": partial(timed, bench, ours)})


def table(model: Any, rows: dict[str, Row]) -> Iterator[str]:
    """Lines in Markdown: medians over the rounds."""
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    whole = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    yield "| work | by | tokens | seconds | tokens/s | share | needed |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, row in rows.items():
        rate = median(row.rates)
        for by, taken in row.seconds.items():
            seconds = median(taken)
            share = row.flops * whole * row.tokens / seconds / rate
            needed = row.flops * (layers * row.tokens + head * row.positions) / seconds / rate
            shown = f"{row.tokens / seconds:,.0f} | {share:.0%} | {needed:.0%}"
            yield f"| {name} | {by} | {row.tokens:,} | {seconds:.1f} | {shown} |"
        ours = median(row.seconds["ours"])
        if faster := [f"{median(taken) / ours:.2f} × {by}" for by, taken in row.seconds.items() if by != "ours"]:
            yield f"| | ours ÷ peers | | | {', '.join(faster)} | | |"


def main(
    folder: Path,
    model: Annotated[str, typer.Argument(help="As `model.source`: an embedded name or a checkpoint.")],
    device: str = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch; llama.cpp uses all cores.")] = torch.get_num_threads(),
    work: Annotated[list[str], typer.Option(help="Repeatable; absent: all.")] = list(WORKS),  # noqa: B006
    rounds: int = 3,
    epochs: Annotated[int, typer.Option(help="Passes of tuning over the 50 shots.")] = 3,
    documents: Annotated[int, typer.Option(help="Scored documents of each benchmark.")] = 50,
    peers: bool = True,
) -> None:
    torch.set_num_threads(threads)
    bench = prepare(folder, load_config(None, [*SETTINGS, f"model.source={model}", f"tuning.epochs={epochs}"]), device)
    makers: dict[str, Callable[[], Row]] = {
        **{name: partial(tuning, bench, name.split()[1], epochs) for name in WORKS[:2]},
        "scoring": partial(scoring, bench, documents),
        "perplexity": partial(perplexity, bench),
        "importance": partial(importance, bench),
    }
    rows = {name: makers[name]() for name in work}
    for _ in range(rounds):
        for row in rows.values():
            for by, run in row.runs.items():
                if peers or by == "ours":
                    row.rates.append(matrix_rate(bench.model))
                    row.seconds.setdefault(by, []).append(run())
            row.rates.append(matrix_rate(bench.model))
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{threads} thread(s)"
    rates = [rate / 1e12 for row in rows.values() for rate in row.rates]
    print(
        f"{model}, {where}, bfloat16, {rounds} round(s); matrix products: {median(rates):.3f} TFLOP/s "
        f"({min(rates):.3f} to {max(rates):.3f})"
    )
    print("\n".join(table(bench.model, rows)))


def prepare(folder: Path, config: RunConfig, device: str) -> Bench:
    """Everything that the works read, kept in a folder and found again."""
    run = kept_in(folder, config)
    prompts = steps.render_all(config)
    dense = steps.load_dense(config)
    groups = stages.groups("build graph", dense=dense)
    calibration = steps.draw_calibration(config, dense, prompts)
    checkpoint = run.open(dense)
    return Bench(
        config,
        checkpoint,
        {name: run.open(ref) for name, ref in prompts.train.items()},
        {name: run.open(ref) for name, ref in prompts.evaluation.items()},
        run.open(groups),
        run.open(calibration),
        ExecutionConfig(device=device),
        load_model(checkpoint, device=pick_device(device)),
        load_tokenizer(checkpoint),
    )


if __name__ == "__main__":
    typer.run(main)
