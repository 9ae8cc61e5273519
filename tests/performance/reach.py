"""How large a model this machine can prune and score: seconds and memory of every stage on a streamed model.

    python tests/performance/reach.py FOLDER --shape 7b --method none
    python tests/performance/reach.py FOLDER --shape 7b --layers 4
    python tests/performance/reach.py FOLDER --shape 70b --layers 4 --streaming never

A checkpoint of random bfloat16 weights is written into FOLDER (kept, and found again), layer by layer. Then each stage
runs in a process of its own: importance (10 × 64 tokens), pruning to the ratio with reconstruction on the same tokens,
and perplexity (1,024 tokens) and 20 questions of the pruned model. `anonymous` is the largest RssAnon seen, sampled
every 10 ms: memory that only the process can free. Pages of mapped files, which the kernel drops when memory is short,
are in `resident`, the high-water mark. A later call finds what a stage wrote, if it skips the stage. `--limit` sets
RLIMIT_DATA so many MiB above an idle process.
"""

import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import pandas as pd
import typer

import pruning as shapes
from helpers import byte_tokenizer, load_and_render, prune, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, PerplexityConfig, ReconstructionConfig, Work
from tailored_llama.evaluation import PerplexitySettings, ScoreSettings, measure_perplexity, score_benchmark
from tailored_llama.memory import _field, peak_memory, reset_peak_memory
from tailored_llama.models import weight_bytes, writing
from tailored_llama.processes import forking
from tailored_llama.pruning import ImportanceSettings, build_graph, read_groups, score_importance

SHAPES: dict[str, dict[str, Any]] = shapes.SHAPES | {
    # Llama 2 70B
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
}  # fmt: skip
STAGES = ("idle", "importance", "pruned", "perplexity", "scores")


def prepare(dense: Path, root: Path, shape: dict[str, Any]) -> None:
    """Write a checkpoint of random weights and the texts that the stages read, unless they are there."""
    if not (dense / "config.json").is_file():
        shapes.write_checkpoint(dense, shape)
        byte_tokenizer().save_pretrained(dense)
    if root.is_dir():
        return
    for name in ("groups", "data"):
        (root / name).mkdir(parents=True)
    shapes.write_tokens(root / "tokens", shape["vocab_size"])
    build_graph(dense, settings=None, work=Work(root / "groups"))
    (root / "data" / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    load_and_render(_benchmark(root), root)


def _benchmark(root: Path) -> BenchmarkConfig:
    return BenchmarkConfig(**write_own_benchmark(root / "data", evaluation=20))


def _stages(
    dense: Path, root: Path, ratio: float, method: Any, execution: ExecutionConfig
) -> dict[str, Callable[[Path], Any]]:
    text = PerplexityConfig(source=str(root / "data" / "text.txt"), window=512, tokens=1024)
    groups, tokens, pruned = (root / name for name in ("groups", "tokens", "pruned"))
    fitted = ReconstructionConfig(method=method)
    return {
        "idle": lambda out: None,
        "importance": lambda out: score_importance(
            dense, groups, tokens, settings=ImportanceSettings("taylor_gate", 0), work=Work(out, execution)
        ),
        "pruned": lambda out: prune(
            dense, groups, root / "importance", tokens, ratio=ratio, out=out, reconstruction=fitted, execution=execution
        ),
        "perplexity": lambda out: measure_perplexity(
            pruned, None, settings=PerplexitySettings.of(text), work=Work(out, execution)
        ),
        "scores": lambda out: score_benchmark(
            pruned, None, root / "prompts", settings=ScoreSettings.of(_benchmark(root)), work=Work(out, execution)
        ),
    }  # fmt: skip


def measure(
    dense: Path,
    root: Path,
    stage: str,
    ratio: float,
    method: str,
    execution: ExecutionConfig,
    limit: int | None = None,
    shard: int | None = None,
) -> dict[str, Any]:
    """Seconds, the largest anonymous and the largest resident memory of one stage in this process, in bytes."""
    if limit is not None:
        read_groups(root / "groups")  # starts pyarrow's threads, whose stacks count
        idle = _field("/proc/self/status", "VmData:") or 0
        resource.setrlimit(resource.RLIMIT_DATA, (idle + limit, idle + limit))
    if shard is not None:
        writing._SHARD = shard
    largest, ended = 0, Event()

    def watch() -> None:
        nonlocal largest
        while not ended.wait(0.01):
            largest = max(largest, _field("/proc/self/status", "RssAnon:") or 0)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    reset_peak_memory()
    start = time.perf_counter()
    out = root / stage
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _stages(dense, root, ratio, method, execution)[stage](out)
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    return {"stage": stage, "seconds": seconds, "anonymous": largest, "resident": peak_memory()}


def alone(*arguments: Any) -> dict[str, Any]:
    """`measure` in a new process, forked from one with all libraries."""
    with ProcessPoolExecutor(1, forking()) as worker:
        return worker.submit(measure, *arguments).result()


def main(
    folder: Path,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "7b",
    layers: Annotated[int | None, typer.Option(help="How many of its layers; all by default.")] = None,
    ratio: float = 0.2,
    method: Annotated[str, typer.Option(help="Of reconstruction.")] = "static",
    streaming: Annotated[str, typer.Option(help="always, auto or never.")] = "always",
    limit: Annotated[int | None, typer.Option(help="RLIMIT_DATA, in MiB above an idle process.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A stage to leave out; repeatable.")] = None,
) -> None:
    """Measure every stage; see the top of this file."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    name = f"{shape}-{sizes['num_hidden_layers']}"
    dense, root = folder / name, folder / f"{name}-{streaming}-{method}"
    prepare(dense, root, sizes)
    print(f"weights {weight_bytes(dense) / 2**30:.2f} GiB, streaming {streaming}")
    execution = ExecutionConfig.model_validate({"device": "cpu", "streaming": streaming})
    bound = None if limit is None else limit * 2**20
    rows = []
    for stage in (stage for stage in STAGES if stage not in (skip or [])):
        rows.append({"model": name, "streaming": streaming, "method": method})
        rows[-1] |= alone(dense, root, stage, ratio, method, execution, bound)
        peaks = [rows[-1][peak] / 2**30 for peak in ("anonymous", "resident")]
        print(
            f"{stage:12} {rows[-1]['seconds']:8.1f} s {peaks[0]:6.2f} GiB anonymous, {peaks[1]:6.2f} resident",
            flush=True,
        )
        pd.DataFrame(rows).to_parquet(folder / f"reach-{root.name}.parquet")


if __name__ == "__main__":
    typer.run(main)
