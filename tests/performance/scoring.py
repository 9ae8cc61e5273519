"""Seconds and tokens/s to score real documents: this library, lm-evaluation-harness, and one plain forward pass.

    python tests/performance/scoring.py CHECKPOINT --out FOLDER [--device cuda]

Evenly spaced documents of each of the seven benchmarks are scored, by each protocol, with lm-eval's HFLM (batch 16,
from its own stock task's requests to log-likelihoods), then with this library (from the same texts). Then the floor is
timed: one forward pass of the unchanged model over as many tokens as are distinct (those of a shared header in a pass
of their own, then from the model's own cache), without padding, in batches of equal rows of the documents' mean length,
at the faster of two batch sizes, the head applied to as many positions as are scored, no probabilities taken. All in
one process. Tokens/s count every choice with its whole context, for both. Peaks are the process's memory, or what torch
allocated on the GPU.

Protocols: zero-shot; 5-shot with one header for the whole benchmark (lm-eval's sampler `first_n`); 5-shot with other
examples for each document (its default sampler). Prints a table and writes FOLDER/scoring.parquet.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import harness
from tailored_llama.data import Prompt, encode_prompt, loglikelihoods, shared_header
from tailored_llama.data.builtin import SEVEN
from tailored_llama.memory import peak_memory, reset_peak_memory
from tailored_llama.models import Encoded, load_model, load_tokenizer, pick_device, token_budget

PROTOCOLS = {"zero-shot": (0, True), "5-shot, one header": (5, True), "5-shot, lm-eval's default": (5, False)}
FLOOR_TOKENS = {"cpu": (512, 1024), "cuda": (4096, 16_384)}  # on a CPU the fastest of 256 to 4,096
FLOOR_HEAD = 256  # positions of the head at a time, the fastest of 32 to 1,024 on a CPU

Requests = list[list[tuple[str, str]]]  # for each document: a context and a continuation per choice


def documents(name: str, shots: int, first_n: bool, count: int) -> Requests:
    """What lm-eval asks for `count` evenly spaced documents of a benchmark."""
    rows = harness.draw_shots(name, shots)[1] if first_n else harness.train_rows(name)
    task = harness.stock_task(name, rows or harness.train_rows(name)[:1], shots, first_n)
    found = list(task.eval_docs)
    kept = len(found) - (shots if name == "hellaswag" else 0)  # its shots are evaluation documents
    return [harness.requests(task, found[i * kept // count], shots) for i in range(count)]


def finished(device: torch.device) -> float:
    """The time at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """What a function returns, its seconds, and the peak memory of the process (or the GPU) while it ran."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()
    start = finished(device)
    result = function()
    seconds = finished(device) - start
    return result, seconds, torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory()


def harness_scores(lm: HFLM, asked: Requests) -> list[list[float]]:
    instances = [
        Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pair for pairs in asked for pair in pairs)
    ]
    values = iter(value for value, _ in lm.loglikelihood(instances, disable_tqdm=True))
    return [[next(values) for _ in pairs] for pairs in asked]


def our_scores(model: Any, tokenizer: Any, asked: Requests, budget: int) -> tuple[list[Encoded], list[list[float]]]:
    limit = model.config.max_position_embeddings
    encoded = []
    for i, pairs in enumerate(asked):
        contexts, continuations = zip(*pairs, strict=True)
        encoded.append(encode_prompt(tokenizer, Prompt(i, contexts, continuations, 0, (1,) * len(pairs)), limit))
    return encoded, loglikelihoods(model, encoded, budget)


def floor_seconds(model: Any, tokens: int, length: int, header: int, scored: int) -> float:
    """Seconds of one forward pass over `tokens` tokens in rows of `length`, at the best batch size of several.

    Where there is a header, its pass is counted, and the rows follow its keys and values in a cache.
    """
    device, rows = model.device, math.ceil(tokens / length)
    ids = torch.randint(1000, (rows, length), device=device)
    best, cache, header_seconds = math.inf, None, 0.0
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.inference_mode():
        if header:
            start = finished(device)
            cache = decoder(torch.randint(1000, (1, header), device=device), use_cache=True).past_key_values
            header_seconds = finished(device) - start
        for batch in sorted({min(rows, max(1, n // length)) for n in FLOOR_TOKENS[device.type]}):
            seconds = 0.0
            states = []
            for part in ids.split(batch):
                seen = copy.deepcopy(cache)
                if seen is not None:
                    seen.batch_repeat_interleave(len(part))
                start = finished(device)
                states.append(decoder(part, past_key_values=seen, use_cache=seen is not None).last_hidden_state)
                seconds += finished(device) - start
            flat = torch.cat([part.flatten(0, 1) for part in states])[:scored]
            start = finished(device)
            for part in flat.split(FLOOR_HEAD):
                head(part)
            best = min(best, seconds + finished(device) - start)
    return header_seconds + best * tokens / (rows * length)


def measure(model: Any, tokenizer: Any, lm: HFLM, asked: Requests, budget: int) -> dict[str, Any]:
    """The same documents by lm-eval, by this library, and the floor of their distinct tokens."""
    theirs, their_seconds, their_peak = timed(lambda: harness_scores(lm, asked), model.device)
    (encoded, ours), our_seconds, our_peak = timed(lambda: our_scores(model, tokenizer, asked, budget), model.device)
    header = len(shared_header(encoded))
    own = sum(len(item.document) - header for item in encoded)
    scored = sum(len({p for choice in item.positions for p in choice}) for item in encoded)
    tokens = sum(len(item.document.prefix) + len(b) for item in encoded for b in item.document.branches)
    return {
        "documents": len(asked),
        "tokens": tokens,
        "unique_tokens": header + own,
        "scored_positions": scored,
        "harness_seconds": their_seconds,
        "our_seconds": our_seconds,
        "floor_seconds": floor_seconds(model, own, round(own / len(encoded)), header, scored),
        "harness_tokens_per_second": tokens / their_seconds,
        "our_tokens_per_second": tokens / our_seconds,
        "harness_peak": their_peak,
        "our_peak": our_peak,
        "difference": max(
            abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)
        ),
    }


def main(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="Folder for scoring.parquet.")],
    benchmark: Annotated[list[str], typer.Option(help="Repeatable; absent: all seven.")] = list(SEVEN),  # noqa: B006
    protocol: Annotated[list[str], typer.Option(help="Repeatable; absent: all.")] = list(PROTOCOLS),  # noqa: B006
    count: Annotated[int, typer.Option("--documents", help="Documents of each benchmark.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; the model has its checkpoint's type.")] = "cpu",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a pass of this library; absent: as execution.batch_tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a pass of lm-eval.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of torch, for all three.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(checkpoint, device=pick_device(device)), load_tokenizer(checkpoint)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    budget = token_budget(batch_tokens, model)
    rows = []
    for kind in protocol:
        for name in benchmark:
            asked = documents(name, *PROTOCOLS[kind], count)
            measure(model, tokenizer, lm, asked[:2], budget)  # warm up
            found = measure(model, tokenizer, lm, asked, budget)
            found["ratio"] = found["harness_seconds"] / found["our_seconds"]
            found["floor_ratio"] = found["floor_seconds"] / found["our_seconds"]
            rows.append({"protocol": kind, "benchmark": name} | found)
            shown = {key: round(v, 5) if isinstance(v, float) else v for key, v in rows[-1].items()}
            print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
    table = pd.DataFrame(rows)
    table.to_parquet(out / "scoring.parquet")
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{threads} thread(s)"
    dtype = str(model.dtype).removeprefix("torch.")
    for kind, part in table.groupby("protocol", sort=False):
        print(f"\n{kind}, {where}, {dtype}\n{part.drop(columns='protocol').to_string(index=False)}")
        means = {name: math.exp(part[name].map(math.log).mean()) for name in ("ratio", "floor_ratio")}
        print(f"geometric mean: {means['ratio']:.2f} times lm-eval, {means['floor_ratio']:.3f} of the floor")


if __name__ == "__main__":
    typer.run(main)
