"""How often is a proof from few labels wrong, and how many labels does it take? Repeated on draws from real answers.

    python tests/performance/few_labels.py STORE [--draws 500] [--choosing]

A STORE has searches whose rows were all labelled, such as those of jobs.py. The reference and every tested candidate
have answered the proving rows, and the mean over all of them counts as the truth. Each draw takes the planned rows,
with replacement, in random order, and hides their labels. The library's own test asks for labels at its looks; those
that it asks for are uncovered. The plan knows the true share of rows that are answered differently, which a search
estimates.

Beside the labels stand those of a proof whose rows are all labelled, of the same power (80 %) if a model loses a
quarter of the margin. `at its loss` has a margin that is exactly what the candidate loses, the hardest case.

With `--choosing`: how far is the loss that a search chooses by from the true one? The root of the mean squared error in
points, with 25 labelled rows; with 750 rows without a label beside them; with the labels of 60 of these that any
candidate of the search answers otherwise, if it does so on more than three points of them; and with 160 labelled rows
alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tailored_llama.data import read_prompts
from tailored_llama.evaluation import (
    POWER,
    Array,
    Compared,
    Look,
    Said,
    answer_form,
    compare_said,
    expected_loss,
    plan_looks,
    read_answer,
    read_metrics,
    read_said,
    rows_needed,
    rows_to_prove,
)
from tailored_llama.evaluation import test_at_looks as decide
from tailored_llama.evaluation.looks import PLANNED_LOSS
from tailored_llama.pipeline.labelling import FEW_TO_CHOOSE, TO_CHOOSE
from tailored_llama.store import read_manifest

LEVEL = 0.04  # of a first opening at 95 % confidence
MARGINS = (0.01, 0.02, 0.03, 0.05)
CHOSEN_BY = 0.03  # the margin, when candidates are chosen
LABELLED, COMPARED = 25, 750  # rows to choose with, of 100 labelled and 3,000 unlabelled ones
LEAST, MOST = 0.01, 0.1  # true losses that are taken for a margin


@dataclass(frozen=True)
class Pair:
    """What a reference and a candidate answered to all rows, and the right answers."""

    name: str
    dense: Array
    small: Array
    right: Array
    search: str

    @property
    def loss(self) -> float:
        return float(np.mean(self.dense == self.right) - np.mean(self.small == self.right))

    @property
    def differing(self) -> float:
        return float(np.mean(self.dense != self.small))


def pairs(store: Path) -> Iterator[Pair]:
    """Each tested candidate of each search in a store, with its reference."""
    for report in sorted((store / "smallest").iterdir()):
        inputs = {name: store / ref.stage / ref.key for name, ref in read_manifest(report).inputs.items()}
        answer = read_answer(report)
        for name, scores in inputs.items():
            if found := re.fullmatch(r"proofs (\d+) small (\S+)", name):
                place, benchmark = found.groups()
                candidate = answer.candidates[answer.order[int(place)]].label
                prompts = inputs[f"proofs {place} prompts {benchmark}"]
                metric = str(read_metrics(scores)["metric"])
                folders = (inputs[f"proofs {place} dense {benchmark}"], scores)
                dense, small = (read_said(folder, prompts, "evaluation", metric, None) for folder in folders)
                form = answer_form(metric)
                asked = read_prompts(prompts, "evaluation")
                right = {row.example: form(row.continuations[row.answer]) for row in asked}
                known = np.array([right[example] for example in dense.examples.tolist()], dtype=object)
                name = f"{benchmark} {candidate}".replace(", ", " in ").replace(",", "")
                yield Pair(name, dense.answers, small.answers, known, report.name)


def prove(pair: Pair, looks: tuple[Look, ...], margin: float, generator: Any) -> tuple[bool, int]:
    """One proof, on rows that are drawn; whether it succeeds, and the labels that it has asked for."""
    drawn = generator.integers(0, len(pair.right), looks[-1].rows)
    dense, small, labels = Said(np.arange(len(drawn)), pair.dense[drawn]), pair.small[drawn], dict[int, str]()
    while True:
        compared: Compared = compare_said(dense, Said(dense.examples, small), labels)
        test, waits = decide(compared, looks, margin, LEVEL)
        if not waits:
            return test.proven, len(labels)
        labels |= {int(i): pair.right[drawn[i]] for i in np.flatnonzero(compared.missing[: test.rows])}


def measure(pair: Pair, margin: float, draws: int, seed: int) -> Mapping[str, float]:
    """The share of draws that prove a candidate, and the labels of these proofs, on average and at most."""
    generator = np.random.default_rng(seed)
    share = max(pair.differing, 1 / len(pair.right))
    looks = plan_looks(rows_to_prove(margin, LEVEL, share, POWER), margin, LEVEL)
    proofs = [prove(pair, looks, margin, generator) for _ in range(draws)]
    labels = [count for _, count in proofs]
    return {
        "rows": looks[-1].rows,
        "proven": float(np.mean([proven for proven, _ in proofs])),
        "labels": float(np.mean(labels)),
        "at most": max(labels),
        "all labelled": rows_needed((1 - PLANNED_LOSS) * margin, LEVEL, share),
    }


def choose(group: Sequence[Pair], draws: int, seed: int) -> Array:
    """The errors of the losses of a search's candidates; see the top of this file. [candidates, ways]."""
    generator, errors = np.random.default_rng(seed), list[Array]()
    differs = np.stack([pair.dense != pair.small for pair in group])
    lost = np.stack([(pair.dense == pair.right).astype(float) - (pair.small == pair.right) for pair in group])
    truth = lost.mean(axis=1)
    for _ in range(draws):
        drawn = generator.integers(0, lost.shape[1], LABELLED + COMPARED)
        has_none = np.arange(len(drawn)) >= LABELLED
        matter = differs[:, drawn].mean(axis=1) > CHOSEN_BY
        asked = np.flatnonzero(differs[matter][:, drawn].any(axis=0) & has_none)[:TO_CHOOSE]
        labelled = np.isin(np.arange(len(drawn)), asked)
        ways = [[float(np.mean(own[generator.integers(0, len(own), LABELLED)])) for own in lost]]
        for unknown in (has_none, has_none & ~labelled):
            rows = zip(lost[:, drawn], differs[:, drawn], strict=True)
            ways.append([expected_loss(own, other, other & unknown) for own, other in rows])
        ways.append([float(np.mean(own[generator.integers(0, len(own), FEW_TO_CHOOSE)])) for own in lost])
        errors.append(100 * (np.array(ways).T - truth[:, None]))
    return np.asarray(np.sqrt(np.mean(np.square(errors), axis=0)))


def main(
    store: Path,
    draws: Annotated[int, typer.Option(help="Draws for each candidate and margin.")] = 500,
    rows: Annotated[int, typer.Option(help="Candidates whose plan has more rows are left out.")] = 20_000,
    seed: int = 0,
    choosing: Annotated[bool, typer.Option("--choosing")] = False,
) -> None:
    """Print a line for each candidate and margin; see the top of this file."""
    if choosing:
        print("candidate,true loss,differing,25 labelled,and 750 unlabelled,and 60 labels,160 labelled")
        for _, members in groupby(pairs(store), key=lambda pair: pair.search):
            group = list(members)
            for pair, errors in zip(group, choose(group, draws, seed), strict=True):
                shares = f"{pair.loss:.4f},{pair.differing:.4f}"
                print(f"{pair.name},{shares},{','.join(f'{error:.1f}' for error in errors)}", flush=True)
        return
    print("candidate,true loss,differing,margin,proven,wrong,labels,at most,rows,all labelled")
    for pair in pairs(store):
        at_its_loss = [pair.loss] if LEAST <= pair.loss <= MOST else []
        for margin in (*MARGINS, *at_its_loss):
            if rows_to_prove(margin, LEVEL, max(pair.differing, 1 / len(pair.right)), POWER) > rows:
                continue
            found = measure(pair, margin, draws, seed)
            wrong = f"{found['proven']:.3f}" if pair.loss >= margin - 1e-12 else ""
            told = f"{margin:.4f}" + " at its loss" * (margin not in MARGINS)
            figures = ",".join(f"{found[name]:.0f}" for name in ("labels", "at most", "rows", "all labelled"))
            shares = f"{pair.loss:.4f},{pair.differing:.4f},{told},{found['proven']:.3f},{wrong}"
            print(f"{pair.name},{shares},{figures}", flush=True)


if __name__ == "__main__":
    typer.run(main)
