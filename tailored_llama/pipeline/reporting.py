"""The last stages: finished models with their cards, and the reports of runs, sweeps and searches."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailored_llama import data, evaluation, models, reports, serving, training
from tailored_llama.config import WRITTEN, RunConfig, SmallestConfig, SweepConfig, Work, named_benchmark
from tailored_llama.errors import NothingToReport
from tailored_llama.evaluation import Answer, MeasuredModel, Proof
from tailored_llama.pipeline.answers import compared, digest_of, write_proof
from tailored_llama.pipeline.graph import as_json, flatten
from tailored_llama.store import CERTIFICATE, MANIFEST, read_manifest, sha256_file

MOST_LOST = 10  # rows that the page of a search shows


@dataclass(frozen=True)
class ReportSettings:
    """The configuration that a report shows."""

    config: RunConfig


def write_run_report(
    *,
    dense: MeasuredModel[Path],
    runs: Sequence[evaluation.TailoredRun[Path]],
    prompts: Mapping[str, Path],
    tuned_dense: evaluation.TunedDense[Path],
    failed: Mapping[str, str],
    settings: ReportSettings,
    work: Work,
) -> None:
    """Stage: write the report of a run from what there is of it; NothingToReport: no model has a score.

    `prompts` are the rendered evaluation prompts. `failed` are the errors of what has left no artifact, by name.
    """
    if not (dense.scores and (not runs or any(run.pruned.scores or run.tailored for run in runs))):
        raise NothingToReport("report: got no scores; allowed: those of the dense model and of a smaller one")
    read = {"dense": dense, "": runs, "prompts": prompts, "dense, tuned": tuned_dense}
    config = settings.config
    of: Sequence[evaluation.TailoredRun[Path] | None] = runs or [None]  # without any, the dense model alone
    inputs = reports.ReportInputs(
        [reports.run_results(dense, run, tuned_dense.scores, config.seed) for run in of],
        config,
        evaluation.read_metrics(dense.perplexity) if dense.perplexity else {},
        prompts,
        [(label, read_manifest(folder)) for label, folder in flatten(read) if isinstance(folder, Path)],
        failed,
    )
    reports.write_report(inputs, out=work.out)


@dataclass(frozen=True)
class SweepSettings:
    """The configuration of a sweep."""

    config: SweepConfig


def write_sweep_report(*, cells: Sequence[evaluation.SweptCell[Path]], settings: SweepSettings, work: Work) -> None:
    """Stage: write the report of a sweep; dense models come first, then every cell."""
    reports.write_sweep(settings.config, list(_sweep_rows(cells)), out=work.out)


def _sweep_rows(
    cells: Sequence[evaluation.SweptCell[Path]],
) -> Iterator[tuple[evaluation.SweepRow, list[evaluation.RecoveryRow]]]:
    """One row for all seeds of a setting, and one for each cell that failed."""
    settings: dict[evaluation.SweepRow, list[evaluation.SweptCell[Path]]] = {}
    for cell in cells:
        settings.setdefault(evaluation.SweepRow(cell.name, cell.ratio), []).append(cell)
    for row, members in settings.items():
        measured = [(cell.model, cell.dense) for cell in members if cell.model and cell.dense]
        if measured:
            yield evaluation.measure(row, *map(list, zip(*measured, strict=True)))
        for cell in members:
            if cell.error is not None:
                label = f"{row.label}, seed={cell.seed}" if len(members) > 1 else row.label
                yield evaluation.SweepRow(label, row.ratio, error=cell.error), []


@dataclass(frozen=True)
class SmallestSettings:
    """The configuration of a search, and what it found."""

    config: SmallestConfig
    answer: Answer


def write_smallest_report(
    *, proofs: Sequence[Proof[Path]], used: Sequence[Path], settings: SmallestSettings, work: Work
) -> None:
    """Stage: write the page of a search.

    `proofs` are those of the tested candidates, in the order of the tests; none if the proving rows were not opened.
    `used` are the artifacts of the search, for their costs.
    """
    config, answer = settings.config, settings.answer
    shown = 0 if answer.proven is None else answer.order.index(answer.proven)
    rows = [row for proof in proofs[shown : shown + 1] for row in _lost(config, answer, proof)]
    costs = [read_manifest(folder) for folder in dict.fromkeys(used)]
    reports.write_smallest(config, answer, rows, costs, out=work.out)


def _lost(config: SmallestConfig, answer: Answer, proof: Proof[Path]) -> Iterator[tuple[str, str]]:
    """Rows that only the dense model gets right, an equal number of each benchmark: its name, and the row as text."""
    for name, folder in proof.small.items():
        metric, labels = data.headline_metric(named_benchmark(config, name)), answer.labels.get(name)
        pair = compared(config, name, proof.dense[name], folder, proof.prompts[name], labels)
        if pair.missing.any():  # whoever gives the labels that are missing must not see what a model answered
            continue
        lost = (pair.dense.values == 1) & (pair.small.values != 1)
        asked = {prompt.example: prompt for prompt in data.read_prompts(proof.prompts[name], "evaluation")}
        chosen = evaluation.read_chosen(folder, metric)
        only_dense = pair.dense.examples[lost].tolist()
        for example in only_dense[: -(-MOST_LOST // len(proof.small))]:
            prompt, wrong = asked[example], chosen[example]
            if not isinstance(wrong, str):
                wrong = prompt.continuations[wrong] if wrong >= 0 else "none of the choices"
            right = labels[example] if labels else prompt.continuations[prompt.answer]
            yield name, f"{prompt.contexts[prompt.answer]}\n\nright: {right.strip()}\nchosen: {wrong.strip()}"


def shown_identity(config: RunConfig) -> dict[str, Any]:
    """The settings without folder names, as the manifest leaves with the model, and what the base's card says."""
    shown = {name: part for name, part in as_json(config).items() if name not in ("execution", "store")}
    base = models.base_of(models.find_model(config.model))
    return {"config": reports.without_folders(shown), "base": as_json(base)}


@dataclass(frozen=True)
class ExportSettings:
    """The settings of a benchmark's finished model, beside its artifacts: those that its card shows."""

    config: RunConfig
    benchmark: str

    def identity(self) -> dict[str, Any]:
        return shown_identity(self.config) | {"benchmark": self.benchmark}


def export_model(
    *,
    dense: MeasuredModel[Path],
    run: evaluation.TailoredRun[Path],
    prompts: Mapping[str, Path],
    settings: ExportSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write the finished model of a benchmark, with its card: the base with its adapter merged.

    A run in float32 of a model in bfloat16 or float16 exports the model's own type, at half the size.
    With `tuning.keep = "better"`, an adapter that is not better than none on held-out examples is left out. `dense` and
    `run` have the scores and the adapter of the benchmark alone. A chat asks its `prompts`, if it can.
    """
    config, benchmark = settings.config, settings.benchmark
    adapter, chat = run.adapters[benchmark], data.read_chat(*prompts.values())
    tuned = training.ships_adapter(config.tuning, training.read_comparison(adapter))
    base, results = models.base_of(models.find_model(config.model)), reports.run_results(dense, run, {}, config.seed)
    pruned, named = run.pruned.checkpoint, named_benchmark(config, benchmark)
    card = reports.tailored_card(results, config, named, base, pruned, tuned)
    card += f"\n{serving.how_to_ask(benchmark, chat)}\n"
    models.merge_adapter(pruned, adapter if tuned else None, out=work.out, card=card, half=base.half)
    _write_chat(chat, work.out)
    return {"adapter": "merged" if tuned else "left out: tuning brought nothing on the held-out examples"}


@dataclass(frozen=True)
class ShipSettings:
    """The settings of a shipped model, beside its weights and scores: its base's search, what was found, its name."""

    config: SmallestConfig
    answer: Answer
    name: str

    @property
    def template(self) -> Path | None:
        """The user's own template set, which leaves with the model."""
        source = self.config.prompts.template
        return None if source in data.shipped() else Path(source).expanduser()

    def identity(self) -> dict[str, Any]:
        template = self.template and sha256_file(self.template)
        labels = json.dumps(as_json(self.answer.labels), sort_keys=True)  # the manifest leaves with the model
        answer = as_json(replace(self.answer, labels={})) | {"labels": digest_of(labels)}
        return shown_identity(self.config) | {"answer": answer, "name": self.name, "template": template}


def ship_model(
    *,
    checkpoint: Path,
    adapter: Path | None,
    gguf: Path | None,
    prompts: Mapping[str, Path],
    proof: Proof[Path],
    settings: ShipSettings,
    work: Work,
) -> dict[str, Any]:
    """Stage: write the proven model in the format of its runtime, with card, `certificate.json` and `proof.parquet`.

    It is the GGUF file that was scored, from the folder `gguf`, or else the checkpoint with its adapter merged, in the
    base model's own 16 bits. `prompts` are what a chat with it asks; none: it keeps its base's chat template.
    """
    config, answer, out = settings.config, settings.answer, work.out
    base, chat = models.base_of(models.find_model(config.model)), data.read_chat(*prompts.values())
    file = None
    if gguf:
        shutil.copytree(gguf, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        files = [file := serving.gguf_file(out)]
    else:
        models.merge_adapter(checkpoint, adapter, out=out, half=base.half)
        _write_chat(chat, out)
        files = models.weight_files(out)
    if settings.template:
        shutil.copy(settings.template, out)
    write_proof(config, answer, proof, out)
    size = sum(file.stat().st_size for file in files)
    hashes = {file.relative_to(out).as_posix(): sha256_file(file) for file in sorted(out.rglob("*")) if file.is_file()}
    hashes.pop(models.CARD, None)
    facts = {"name": settings.name, "bytes": size, "sha256": hashes}
    served = {name: _served(folder, out, bool(chat)) for name, folder in proof.small.items()}
    certificate = reports.certificate_of(answer, config, facts)
    certificate |= {"served": served, "run": settings.identity()["config"]}
    (out / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n")
    card = reports.answer_card(answer, config, base, checkpoint, certificate)
    asked = serving.how_to_ask(settings.name, chat, file)
    (out / models.CARD).write_text(f"{card}\n{asked}\n", encoding="utf-8")
    return {"bytes": size}


def _write_chat(chat: data.Chat | None, out: Path) -> None:
    """Write what whoever loads a checkpoint asks it with, if a chat asks it anything."""
    if chat:
        serving.write_chat_template(out, chat)
        serving.write_schema(out, chat)
        data.write_chat(out, chat)


def _served(scores: Path, model: Path, is_chat: bool) -> dict[str, Any]:
    """How the shipped model was asked on the proving rows: by llama.cpp, as its scores say, or by transformers.

    What its chat template writes is what transformers was given, if it is a chat.
    """
    measured, template = evaluation.read_metrics(scores), model / "chat_template.jinja"
    if "served" in measured:
        return dict(measured["served"])
    written = measured["metric"] in WRITTEN or "written" in measured
    asked = ("chat" if is_chat else "prompt") if written else "log-likelihoods"
    digest = sha256_file(template) if template.is_file() else None
    return {"asked": asked, "runtime": f"transformers {version('transformers')}", "template": digest}
