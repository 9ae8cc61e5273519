"""How often is the smallest model's certificate wrong? The procedure repeated on draws from real predictions.

    python tests/performance/error_rates.py STORE
    python tests/performance/error_rates.py LADDERS.toml --draws 500

A STORE is searched for ladders: the scores of a dense checkpoint on a benchmark, and those of the checkpoints that were
pruned from it, with an adapter or without; costs are parameters. A file lists them:

    [[ladder]]
    model = "gemma"
    benchmark = "piqa"
    rungs = [{scores = "FOLDER", cost = 268}, {scores = "FOLDER", cost = 134}]   # the dense model first

The mean over all rows of a score counts as the truth. Choosing and proving rows are drawn from them with replacement,
independently of each other. On each pair of draws, the library's own search, sequence and test give an answer, at level
0.05: one opening that spends the whole error. The reference is the first dense model, as it is. Beside it stands the
point estimate: the smallest candidate whose loss on the choosing rows is within the margin, with no proof.

Where nothing is proven, the dense model is the answer. A cost is relative to the smallest candidate whose true loss is
below the margin. `at the loss of` repeats the procedure with a margin that is exactly what one candidate truly loses,
the hardest case for the test.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tailored_llama.errors import InputError
from tailored_llama.evaluation import (
    Array,
    Ladder,
    Measured,
    Rung,
    p_value,
    read_answers,
    read_metrics,
    search,
    sequence,
)
from tailored_llama.evaluation.proof import nominal_level
from tailored_llama.store import Manifest, read_manifest

LEVEL = 0.05
MARGINS = (0.02, 0.03, 0.05)
SIZES = ((150, 150), (300, 300), (300, 1000), (1000, 1000))  # choosing, proving


@dataclass(frozen=True)
class Model:
    """A model's cost, and its value on every row: 1 for right."""

    name: str
    cost: float
    values: Array


@dataclass(frozen=True)
class Case:
    """One search: ladders on one benchmark; the first model of the first ladder is the reference.

    With `by_bits`, the reference stands alone, and the other ladders are of the same models in fewer and fewer bits.
    """

    name: str
    benchmark: str
    ladders: Sequence[Sequence[Model]]
    by_bits: bool = False

    @property
    def models(self) -> list[Model]:
        return [model for ladder in self.ladders for model in ladder]

    @property
    def losses(self) -> Array:
        """float64 [models, rows]"""
        reference = self.ladders[0][0].values
        return np.stack([reference - model.values for model in self.models])


@dataclass(frozen=True)
class Rates:
    """Shares of the draws, and the mean relative cost of the answer."""

    wrong: float
    nothing: float  # smaller than the reference
    cost: float


def in_store(store: Path) -> Iterator[Case]:
    """The searches that the scores of a store allow: for each seed of the adapters, of each dense model and of all."""
    found: dict[tuple[str, str], dict[str, list[tuple[str, int | None, Model]]]] = {}
    for folder in sorted((store / "scores").iterdir()):
        scored = read_manifest(folder)
        if scored.config.get("written") or scored.config["split"] != "evaluation":
            continue
        checkpoint, adapter = _manifest(store, scored, "checkpoint"), _manifest(store, scored, "adapter")
        if (
            checkpoint is None
            or (checkpoint.stage == "dense" and adapter)
            or checkpoint.stage not in ("dense", "pruned")
        ):
            continue
        base = checkpoint if checkpoint.stage == "dense" else _manifest(store, checkpoint, "dense")
        base = base or checkpoint
        prompts = scored.inputs["prompts"].key
        kind = "dense" if checkpoint.stage == "dense" else "tailored" if adapter else "pruned"
        cost = checkpoint.measured["parameters"]
        model = read_model(f"{kind} {cost / 1e6:.0f}M", cost, folder)
        rows = found.setdefault((scored.config["benchmark"], prompts), {})
        rows.setdefault(base.key, []).append((kind, adapter.config["seed"] if adapter else None, model))
    for (benchmark, _), bases in found.items():
        seeds = {seed for models in bases.values() for _, seed, _ in models if seed is not None}
        for seed in sorted(seeds) or [None]:
            ladders = {}
            for models in bases.values():
                own = [(kind, model) for kind, drawn, model in models if drawn in (None, seed)]
                dense = [model for kind, model in own if kind == "dense"]
                smaller = [pair for pair in own if pair[0] != "dense"]
                smaller.sort(key=lambda pair: (pair[0] != "tailored", pair[0], -pair[1].cost))
                if dense and smaller:
                    name = f"base of {dense[0].cost / 1e6:.0f}M, seed {seed}"
                    groups = groupby(smaller, lambda pair: pair[0])
                    ladders[name] = [[dense[0], *(model for _, model in group)] for _, group in groups]
            for name, rungs in ladders.items():
                yield Case(name, benchmark, rungs)
            if len(ladders) > 1:
                largest_first = sorted(ladders.values(), key=lambda rungs: -rungs[0][0].cost)
                yield Case(f"all bases, seed {seed}", benchmark, [ladder for own in largest_first for ladder in own])


def _manifest(store: Path, of: Manifest, name: str) -> Manifest | None:
    ref = of.inputs.get(name)
    folder = store / ref.stage / ref.key if ref else store
    return read_manifest(folder) if (folder / "manifest.json").is_file() else None


def in_file(path: Path) -> Iterator[Case]:
    """The ladders that a file lists; those of one model and benchmark are searched together."""
    listed: dict[tuple[str, str], list[list[Model]]] = {}
    for entry in tomllib.loads(path.read_text())["ladder"]:
        rungs = [
            read_model(f"{entry['model']} {rung['cost']}", rung["cost"], Path(rung["scores"]))
            for rung in entry["rungs"]
        ]
        listed.setdefault((entry["model"], entry["benchmark"]), []).append(rungs)
    for (model, benchmark), ladders in listed.items():
        yield Case(model, benchmark, ladders, len(ladders[0]) == 1)


def read_model(name: str, cost: float, scores: Path) -> Model:
    return Model(name, cost, read_answers(scores, read_metrics(scores)["metric"]).values)


def repeat(case: Case, margin: float, sizes: tuple[int, int], draws: int, seed: int) -> dict[str, Rates]:
    """The procedure on so many draws, and the point estimate on the same ones."""
    losses, models = case.losses, case.models
    (choosing, proving), rows = sizes, losses.shape[1]
    generator = np.random.default_rng(seed)
    even = np.full(rows, 1 / rows)
    chosen = generator.multinomial(choosing, even, draws) @ losses.T / choosing
    proving_counts = generator.multinomial(proving, even, draws)
    reference = models[0]
    ladders = [
        Ladder(tuple(m.cost for m in own), own[0] is reference, i - 1 if case.by_bits and i > 1 else None)
        for i, own in enumerate(case.ladders)
    ]
    starts = np.cumsum([0, *(len(own) for own in case.ladders)])
    answers: dict[str, list[int]] = {"certificate": [], "point estimate": []}
    for measured, counts in zip(chosen, proving_counts, strict=True):

        def look(rungs: Sequence[Rung], measured: Array = measured) -> list[Measured]:
            at = [int(starts[rung.ladder]) + rung.position for rung in rungs]
            return [Measured(rung, models[i].cost, float(measured[i])) for rung, i in zip(rungs, at, strict=True)]

        answer = 0
        for one in sequence(search(ladders, look, margin), margin):
            at = int(starts[one.rung.ladder]) + one.rung.position
            if p_value(np.repeat(losses[at], counts), margin) > nominal_level(int(counts.sum()), margin, LEVEL):
                break
            answer = at
        answers["certificate"].append(answer)
        within = [at for at, loss in enumerate(measured) if loss <= margin]
        answers["point estimate"].append(min(within, key=lambda at: models[at].cost))
    return {how: rate(case, margin, np.array(own)) for how, own in answers.items()}


def rate(case: Case, margin: float, answers: Array) -> Rates:
    truth, costs = case.losses.mean(axis=1), np.array([model.cost for model in case.models])
    too_bad = truth >= margin - 1e-12
    best = costs[~too_bad].min()
    smaller = costs[answers] < costs[0]
    return Rates(float(too_bad[answers].mean()), float(1 - smaller.mean()), float((costs[answers] / best).mean()))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_rates(cases: Sequence[Case], draws: int, seed: int) -> None:
    """Rates of every case, and the worst of them; those at the margins that a candidate truly loses stand alone."""
    titles = ("case", "benchmark", "rows", "margin", "wrong", "nothing smaller", "cost")
    point = ("point: wrong", "nothing smaller", "cost")
    lines, at_margin = [], []
    for case in cases:
        truths = case.losses.mean(axis=1)
        margins = [(f"{100 * margin:.0f}", margin) for margin in MARGINS]
        margins += [
            (f"{100 * truth:.2f}, at the loss of {model.name}", float(truth))
            for model, truth in zip(case.models, truths, strict=True)
            if 0.01 <= truth <= 0.1
        ]
        for sizes, (label, margin) in product(SIZES, margins):
            both = repeat(case, margin, sizes, draws, seed)
            shares = [f"{own.wrong:.3f} {own.nothing:.2f} {own.cost:.2f}".split() for own in both.values()]
            line = (case.name, case.benchmark, f"{sizes[0]} / {sizes[1]}", label, *shares[0], *shares[1])
            (at_margin if "at" in label else lines).append((line, both))
    for name, group in (("margins of whole points", lines), ("margins that a candidate truly loses", at_margin)):
        if not group:
            continue
        print(f"## {name}\n")
        table([*titles, *point], [line for line, _ in group])
        for how in ("certificate", "point estimate"):
            wrong = [both[how].wrong for _, both in group]
            cost = np.mean([both[how].cost for _, both in group])
            print(f"{how}: wrong at most {max(wrong):.3f}, mean {np.mean(wrong):.3f}; mean relative cost {cost:.2f}")
        print()


def main(
    sources: list[Path],
    draws: Annotated[int, typer.Option(help="Pairs of draws for each cell.")] = 500,
    rows: Annotated[int, typer.Option(help="Scores of fewer rows are left out.")] = 400,
    seed: int = 0,
) -> None:
    """Print the tables; see the top of this file."""
    cases = [case for source in sources for case in (in_store(source) if source.is_dir() else in_file(source))]
    cases = [case for case in cases if case.losses.shape[1] >= rows]
    if not cases:
        raise InputError(f"sources: no ladder with {rows} rows in {', '.join(map(str, sources))}; allowed: see --rows")
    for case in cases:
        losses = ", ".join(
            f"{model.name}: {100 * loss:+.1f}"
            for model, loss in zip(case.models, case.losses.mean(axis=1), strict=True)
        )
        print(f"- {case.name}, {case.benchmark}, {case.losses('accuracy').shape[1]} rows; true losses: {losses}")
    print()
    print_rates(cases, draws, seed)


if __name__ == "__main__":
    typer.run(main)
