"""The report of a search for the smallest model: the verdict, the frontier, the candidates and the proof."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from itertools import count
from pathlib import Path
from typing import Any

from tailored_llama import evaluation
from tailored_llama.config import SmallestConfig
from tailored_llama.evaluation import FIRST_SHARE, Answer, Candidate, LossTest
from tailored_llama.reports.cards import claim, cost_of
from tailored_llama.reports.costs import cost_table
from tailored_llama.reports.figures import COLOURS, DASHES, Picture, curve_style, new_figure, styled, xy
from tailored_llama.reports.pages import Report, Section, settings_of, shorten, write_pages
from tailored_llama.reports.parts import lost, megabytes, number, p_value, percent
from tailored_llama.reports.tables import Cell, Column, Table, table_row
from tailored_llama.serving import bits_of
from tailored_llama.store import Manifest


def write_smallest(
    config: SmallestConfig, answer: Answer, rows: Sequence[tuple[str, str]], costs: Sequence[Manifest], *, out: Path
) -> None:
    """Stage: write the pages and `answer.json`.

    `rows` are examples that only the dense model gets right, each with its benchmark. `costs` are the manifests of all
    artifacts of the search.
    """
    evaluation.write_answer(answer, out)
    stages = Counter(cost.stage for cost in costs)
    by_stage = [(f"{(n := stages[cost.stage])} artifact{'s' * (n > 1)}", cost) for cost in costs]
    unopened = [] if answer.tests else ["No candidate came so far that the proving rows were opened."]
    report = Report(
        f"The smallest model for {', '.join(benchmark.name for benchmark in config.benchmarks)}",
        verdict(answer),
        [*unopened, *(f"{label} failed: {error}" for label, error in answer.failed.items())],
        [
            Section("What was tried", {"frontier": _picture(answer)}, _candidates(answer)),
            Section("The proof", table=_tests(answer)),
            Section("What only the dense model gets right", samples=[(name, shorten(row, 800)) for name, row in rows]),
            Section("Rows", table=_sets(answer)),
            Section("What the search cost", table=cost_table(by_stage)),
        ],
        settings_of(config),
    )
    write_pages(report, "smallest", out, answer=answer)


def verdict(answer: Answer) -> list[str]:
    """The result in sentences: what is proven and what was measured, or what a proof lacks."""
    if (place := answer.proven) is None:
        return _unproven(answer)
    best = answer.candidates[place]
    several, tests = len(answer.tests[0]) > 1, answer.tests[answer.order.index(place)]
    measured = [
        f"Measured{f' on {name}' if several else ''}: it {_loses(test.loss)} on {number(test.rows, 0)} rows; the "
        f"largest loss not excluded is {lost(test.bound, 2)} points."
        for name, test in tests.items()
    ]
    sentences = [claim(answer), f"The reference is {answer.reference}.", *measured]
    if not best.ratio and bits_of(best.type) < 16:
        return ["The dense model in fewer bits is the answer: do not prune, quantise.", *sentences]
    if not best.ratio:
        return ["The dense model in 16 bits is the answer: nothing smaller is proven.", *sentences]
    return [*sentences, *(["Only tokens were removed from it, nothing else."] if best.trimmed else [])]


def _unproven(answer: Answer) -> list[str]:
    """What the nearest candidate lacks: rows, if it loses less than the margin, or else a larger margin."""
    margin = answer.goal.lose_at_most / 100
    nearest = answer.candidates[answer.order[0] if answer.tests else answer.nearest]
    failed = {name: test for name, test in answer.tests[0].items() if not test.proven} if answer.tests else {}
    losses = {name: test.loss for name, test in failed.items()} or nearest.losses
    on = "the proving rows" if failed else "the choosing rows"
    text = ", and ".join(f"{_loses(loss)} on {on} of {name}" for name, loss in losses.items())
    bounds = [test.bound for test in failed.values()] or [*losses.values(), nearest.smoothed]
    options = f"a margin {'' if failed else 'well '}above {lost(max(bounds), 2)} points, or a better base model"
    if failed and max(losses.values()) < margin:
        rows = ", and ".join(_rows_missing(name, test) for name, test in failed.items())
        missing = f"What is missing, if it loses no more than measured: {rows}; or {options}."
    else:
        missing = f"More rows will not help, as it loses too much. What is missing: {options}."
    return [f"No candidate is proven. The nearest is {nearest.label}: it {text}.", missing]


def _rows_missing(name: str, test: LossTest) -> str:
    """How many rows would prove the measured loss, four times in five."""
    widest = evaluation.provable_margin(test.rows, test.level, 1)
    share = ((test.bound - test.loss) / widest) ** 2  # which explains the bound
    needed = evaluation.rows_needed(test.margin - max(test.loss, 0), test.level, share)
    return f"about {number(float(f'{needed:.2g}'), 0)} rows of {name} to prove on, instead of {number(test.rows, 0)}"


def _loses(loss: float) -> str:
    return f"gains {lost(-loss)} points" if loss < 0 else f"loses {lost(loss)} points"


def _outcome(answer: Answer, place: int) -> str:
    tested = dict(zip(answer.order, answer.tests, strict=False))
    if place == answer.proven:
        return "the answer"
    if place in tested:
        return "proven" if evaluation.is_proven(tested[place]) else "not proven"
    return "loses too much" if answer.candidates[place].smoothed > answer.goal.lose_at_most / 100 else "not tested"


def _candidates(answer: Answer) -> Table:
    """A row for every candidate, the largest first; the answer is bold."""
    names, bases = list(answer.candidates[0].losses), _names(answer)
    several = len(names) > 1
    costs = [] if answer.goal.smallest == "file" else [Column(cost_of(answer, 0)[1].replace(" ", "\n", 1))]
    columns = [
        Column("base", left=True),
        Column("removed"),
        Column("type", left=True),
        Column("tuned", left=True, wide=True),
        Column("parameters", wide=True),
        Column("file"),
        *costs,
        *(Column(f"loss on\n{name}" if several else "loss", wide=several) for name in names),
        Column("smoothed\nloss", wide=not several),
        Column("outcome", left=True),
    ]
    rows = []
    for place, one in enumerate(answer.candidates):
        cost = [] if answer.goal.smallest == "file" else [number(cost_of(answer, one.cost)[0], 1)]
        share = percent(one.ratio, 0) if one.ratio else "–"
        removed = Cell(share, ("only tokens",) if one.trimmed else (), share)
        cells: list[Cell | str] = [bases[one.base], removed]
        cells += [one.type or "16 bits", "yes" if one.tuned else "no", number(one.parameters, 0)]
        cells += [megabytes(one.bytes), *cost, *(lost(one.losses[name]) for name in names), lost(one.smoothed)]
        rows.append(table_row(*cells, _outcome(answer, place), bold=place == answer.proven))
    return Table(tuple(columns), tuple(rows))


def _tests(answer: Answer) -> Table:
    """A row for every test: a tested candidate on a benchmark. Probabilities have no counts."""
    counted = answer.goal.measure == "accuracy"
    counts = ("both\nright", "only\ndense", "only\nsmall", "both\nwrong") if counted else ()
    titles = ("rows", *counts, "loss", "largest loss\nnot excluded", "p", "bootstrap")
    rows = []
    for place, tests in zip(answer.order, answer.tests, strict=False):
        one = answer.candidates[place]
        base, how = _names(answer)[one.base], one.label.removeprefix(f"{one.base}, ")
        for name, test in tests.items():
            found = astuple(test.counts) if test.counts else (None,) * len(counts)
            cells: list[Cell | str] = [Cell(base, (how, *([name] if len(tests) > 1 else [])))]
            cells += [number(count, 0) for count in (test.rows, *found)]
            cells += [lost(test.loss), lost(test.bound, 2), p_value(test.p), percent(test.bootstrap, 2)]
            rows.append(table_row(*cells, "proven" if test.proven else "not proven", bold=place == answer.proven))
    columns = (Column("candidate", left=True), *map(Column, titles), Column("outcome", left=True))
    return Table(columns, tuple(rows), (_level(answer),) if rows else ())


def _level(answer: Answer) -> str:
    level, error = next(iter(answer.tests[0].values())).level, 1 - answer.goal.confidence
    nominal = sorted({percent(test.nominal, 2) for tests in answer.tests for test in tests.values() if test.nominal})
    compared = f" p has to be at most {' or '.join(nominal)}, so that on so many rows a test errs no more often."
    return (
        f"The level of each test is {percent(level, 2)}, as this is opening {answer.opening} of the proving rows. "
        f"All openings together may err in {percent(error)} of cases; each spends {percent(FIRST_SHARE, 0)} of what is "
        f"left of that.{compared if nominal else ''}"
    )


def _sets(answer: Answer) -> Table:
    """How many rows each benchmark has for each purpose, with the first characters of their digest."""
    purposes, rows = list(dict.fromkeys(use for sets in answer.sets.values() for use in sets)), []
    for name, sets in answer.sets.items():
        known = [sets.get(use) for use in purposes]
        rows.append(table_row(name, *(Cell(number(one.rows, 0), (one.digest[:12],)) if one else "–" for one in known)))
    legend = "With the first characters of the SHA-256 of their texts and right answers. No row is in two sets."
    return Table((Column("benchmark", left=True), *map(Column, purposes)), tuple(rows), (legend,))


@styled
def _picture(answer: Answer) -> Picture:
    """Losses in points over costs, the worst at the bottom, with the margin; what loses eight margins is cut off.

    There is a line through the smoothed losses of every base model and type, and a grey one for each dense model's
    types; measured losses are points. Candidates chosen for the proof are ringed, and so is the answer.
    """
    names, margin, lines = _names(answer), answer.goal.lose_at_most, dict[str, list[Candidate]]()
    for base, name in names.items():
        members = [one for one in answer.candidates if one.base == base]
        if dense := [one for one in members if not one.ratio]:
            lines[f"{name}, dense"] = dense
        for kind in dict.fromkeys(one.type for one in members if one.ratio):
            lines[f"{name}, {kind or '16 bits'}"] = [one for one in members if one.type == kind]
    figure = new_figure(440 + 11 * len(lines))
    axes, losses, dense_lines, ladders = figure.subplots(), [0.0, 1.5 * margin], count(), count()
    for label, members in lines.items():
        is_dense = not any(one.ratio for one in members)
        grey = {"color": COLOURS["dense"], "linestyle": DASHES[1 + next(dense_lines) % 2]} if is_dense else None
        style = grey or curve_style(next(ladders))
        path = [_at(answer, one, one.smoothed) for one in members]
        points = [_at(answer, one, one.loss) for one in members if one.ratio or is_dense]  # those of dense models once
        axes.plot(*xy(sorted(path)), **style, linewidth=2, label=label)
        axes.plot(*xy(points), "s" if is_dense else "o", color=style["color"], markersize=6)
        losses += [loss for _, loss in (*path, *points)]
    ring: Any = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgecolor": COLOURS["ink"]}
    if chosen := [answer.candidates[place] for place in answer.order]:
        ringed = xy([_at(answer, one, one.loss) for one in chosen])
        axes.plot(*ringed, **ring, markersize=13, label="chosen for the proof")
    if answer.proven is not None:
        proven = answer.candidates[answer.proven]
        at = _at(answer, proven, proven.loss)
        axes.plot(*at, **ring, markersize=17, markeredgewidth=3, label="proven: the answer")
        text = megabytes(proven.bytes)
        axes.annotate(text, at, (-12, 7), textcoords="offset points", ha="right")  # nothing smaller loses less
    axes.axhline(margin, color=COLOURS["ink"], linewidth=1.5, linestyle=(0, (4, 2)), label=f"margin: {margin:g} points")
    worst, best = min(max(losses), 8 * margin), min(losses)
    size = "size of the file, MB" if answer.goal.smallest == "file" else cost_of(answer, 0)[1]
    axes.set(xlabel=size, ylabel="loss on the choosing rows, points")
    axes.set_ylim(worst + (worst - best) / 20, best - (worst - best) / 10)
    axes.margins(x=0.09)
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2, borderpad=0, markerscale=0.6)
    return Picture(figure, f"loss on the choosing rows, points over {size}: {', '.join(lines)}")


def _names(answer: Answer) -> dict[str, str]:
    """The base models with their names, without folders or owners where these tell nothing apart."""
    bases = list(dict.fromkeys(one.base for one in answer.candidates))
    short = [base.rstrip("/").rsplit("/", 1)[-1] for base in bases]
    return dict(zip(bases, short if len(set(short)) == len(bases) else bases, strict=True))


def _at(answer: Answer, one: Candidate, loss: float) -> tuple[float, float]:
    return cost_of(answer, one.cost)[0], 100 * loss
