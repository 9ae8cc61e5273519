"""The report of a search for the smallest model: the verdict, the frontier, the candidates and the proof."""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tailored_llama import evaluation
from tailored_llama.config import SmallestConfig
from tailored_llama.evaluation import FIRST_SHARE, Answer, CandidateFigures, LossTest
from tailored_llama.reports.cards import claim, cost_of, figures_of, size_of
from tailored_llama.reports.figures import COLOURS, DASHES, Picture, curve_style, new_figure, styled, xy
from tailored_llama.reports.pages import Report, Section, lines_of, settings_of, shorten, write_pages
from tailored_llama.reports.parts import cost_table, lost, megabytes, number, percent, points_lost
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
    unopened = [] if answer.tests else ["No candidate was good enough to open the proving rows."]
    lead, figures = _result(answer)
    report = Report(
        f"The smallest model for {', '.join(benchmark.name for benchmark in config.benchmarks)}",
        lead,
        [*unopened, *(f"{label} failed: {error}" for label, error in answer.failed.items())],
        [
            Section("What was tried", {"frontier": _picture(answer)}, _candidates(answer)),
            Section("The proof", table=_tests(answer)),
            Section("What only the dense model gets right", samples=[(name, shorten(row, 800)) for name, row in rows]),
            Section("Rows", table=_sets(answer)),
            Section("What the search cost", table=cost_table(by_stage)),
        ],
        settings_of(config),
        figures,
    )
    write_pages(report, "smallest", out, answer=answer)


def verdict(answer: Answer) -> str:
    """The result in lines: the verdict, its figures, and what was compared; or what a proof lacks."""
    lead, figures = _result(answer)
    return "\n".join(lines_of(lead, figures))


def _result(answer: Answer) -> tuple[list[str], list[tuple[str, str]]]:
    """The result in sentences, the verdict first, and its figures by name; of several benchmarks, the worst one's."""
    doubt = [answer.doubt] if answer.doubt else []
    if (position := answer.proven) is None:
        return [*_unproven(answer), *doubt], []
    candidate, tests = answer.candidates[position], answer.tested[position]
    benchmark, test = max(tests.items(), key=lambda item: item[1].bound)
    rows = f"rows of {benchmark}, the worst" if len(tests) > 1 else "rows"
    removed = percent(candidate.ratio, 0)
    figures = [
        ("size", size_of(answer, candidate)),
        ("parameters removed", f"{removed}{', only tokens' * candidate.trimmed}" if candidate.ratio else "none"),
        (f"measured loss on {number(test.rows, 0)} {rows}", f"{lost(test.loss)} points"),
        ("largest loss not excluded", f"{lost(test.bound, 2)} points"),
    ]
    if test.looks:
        given = sum(len(labels) for labels in answer.labels.values())
        figures.append(("labels that were asked for and given", number(given, 0)))
    compared = f"The model is {candidate.label}. The reference is {answer.reference}."
    return [_verdict(answer, candidate), compared, *doubt], figures


def _verdict(answer: Answer, candidate: CandidateFigures) -> str:
    """The verdict on a proven candidate, in one sentence."""
    if candidate.type == "source":
        return claim(answer, "Nothing smaller is proven: the file as it is")
    if candidate.ratio:
        return claim(answer, "Proven: a pruned model")
    if bits_of(candidate.type) < 16:
        return claim(answer, f"Do not prune, quantise: the dense model in {candidate.type}")
    return claim(answer, "Nothing smaller is proven: the dense model in 16 bits")


def _unproven(answer: Answer) -> list[str]:
    """Say what the nearest candidate lacks: rows, if it loses less than the margin, or else a larger margin."""
    margin = answer.goal.lose_at_most / 100
    nearest = answer.candidates[answer.order[0] if answer.tests else answer.nearest]
    failed = {name: test for name, test in answer.tests[0].items() if not test.proven} if answer.tests else {}
    losses = {name: test.loss for name, test in failed.items()} or nearest.losses
    on = "the proving rows" if failed else "the choosing rows"
    text = ", and ".join(f"{points_lost(loss)} on {on} of {name}" for name, loss in losses.items())
    bounds = [test.bound for test in failed.values()] or [*losses.values(), nearest.smoothed]
    options = f"a margin {'' if failed else 'well '}above {lost(max(bounds), 2)} points, or a better base model"
    if failed and max(losses.values()) < margin:
        rows = ", and ".join(_rows_missing(name, test) for name, test in failed.items())
        missing = f"What is missing, if it loses no more than measured: {rows}; or {options}."
    else:
        missing = f"More rows will not help, as it loses too much. What is missing: {options}."
    return ["No candidate is proven.", f"The nearest is {nearest.label}: it {text}.", missing]


def _rows_missing(name: str, test: LossTest) -> str:
    """Say how many rows would prove the measured loss, four times in five."""
    widest = evaluation.provable_margin(test.rows, test.level, 1)
    share = ((test.bound - test.loss) / widest) ** 2  # which explains the bound
    needed = evaluation.rows_needed(test.margin - max(test.loss, 0), test.level, share)
    return f"about {number(float(f'{needed:.2g}'), 0)} rows of {name} to prove on, instead of {number(test.rows, 0)}"


def _outcome(answer: Answer, place: int) -> str:
    if place == answer.proven:
        return "the answer"
    if tests := answer.tested.get(place):
        return "proven" if evaluation.is_proven(tests) else "not proven"
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
    for place, candidate in enumerate(answer.candidates):
        cost = [] if answer.goal.smallest == "file" else [number(cost_of(answer, candidate.cost)[0], 1)]
        share = percent(candidate.ratio, 0) if candidate.ratio else "–"
        removed = Cell(share, ("only tokens",) if candidate.trimmed else (), share)
        kind = "as it is" if candidate.type == "source" else candidate.type or "16 bits"
        tuned, sizes = "yes" if candidate.tuned else "no", (number(candidate.parameters, 0), megabytes(candidate.bytes))
        losses = [lost(loss) for loss in (*(candidate.losses[name] for name in names), candidate.smoothed)]
        figures = (kind, tuned, *sizes, *cost, *losses, _outcome(answer, place))
        rows.append(table_row(bases[candidate.base], removed, *figures, bold=place == answer.proven))
    return Table(tuple(columns), tuple(rows))


def _tests(answer: Answer) -> Table:
    """A row for every test: a tested candidate on a benchmark."""
    few = any(test.looks for tests in answer.tests for test in tests.values())
    counted = ("alike" if few else "both\nright", "only\ndense", "only\nsmall", "both\nwrong")
    titles = ("rows", *(["labels"] if few else []), *counted, "loss", "largest loss\nnot excluded", "p")
    rows = []
    for place, tests in answer.tested.items():
        candidate = answer.candidates[place]
        base, how = _names(answer)[candidate.base], candidate.label.removeprefix(f"{candidate.base}, ")
        for name, test in tests.items():
            model = Cell(base, (how, *([name] if len(tests) > 1 else [])))
            counts = [number(count, 0) for count in (test.rows, *([test.labels] if few else []))]
            outcome = "proven" if test.proven else "not proven"
            rows.append(table_row(model, *counts, *figures_of(test), outcome, bold=place == answer.proven))
    columns = (Column("candidate", left=True), *map(Column, titles), Column("outcome", left=True))
    notes = (_level(answer), *([_looks(answer)] if few else [])) if rows else ()
    return Table(columns, tuple(rows), notes)


def _looks(answer: Answer) -> str:
    """Say what labels were needed for, and when the tests looked at them."""
    test = next(iter(answer.tests[0].values()))
    planned = ", ".join(f"{number(look.rows, 0)} ({percent(look.level, 2)})" for look in test.looks)
    without = max(own.missing for tests in answer.tests for own in tests.values())
    lacking = f" Up to {number(without, 0)} rows without a label count as lost." if without else ""
    return (
        "Rows that both models answer alike need no label: whatever it is, they add nothing to the loss. Each test may "
        f"be passed after {planned} rows, in brackets the level there.{lacking}"
    )


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
    """Show how many rows each benchmark has for each purpose, with the first characters of their digest."""
    purposes, rows = list(dict.fromkeys(use for sets in answer.sets.values() for use in sets)), []
    for name, sets in answer.sets.items():
        known = [sets.get(use) for use in purposes]
        cells = [Cell(number(part.rows, 0), (part.digest[:12],)) if part else "–" for part in known]
        rows.append(table_row(name, *cells))
    legend = "With the first characters of the SHA-256 of their texts and right answers. No row is in two sets."
    return Table((Column("benchmark", left=True), *map(Column, purposes)), tuple(rows), (legend,))


@styled
def _picture(answer: Answer) -> Picture:
    """Losses in points over costs, the worst at the bottom, with the margin; what loses eight margins is cut off.

    There is a line through the smoothed losses of every base model and type, and a grey one for each dense model's
    types; measured losses are points. Candidates chosen for the proof are ringed, and so is the answer.
    """
    names, margin, lines = _names(answer), answer.goal.lose_at_most, dict[str, list[CandidateFigures]]()
    for base, name in names.items():
        members = [candidate for candidate in answer.candidates if candidate.base == base]
        if dense := [candidate for candidate in members if not candidate.ratio and candidate.type != "source"]:
            lines[f"{name}, dense"] = dense
        for kind in dict.fromkeys(candidate.type for candidate in members if candidate.ratio):
            lines[f"{name}, {kind or '16 bits'}"] = [candidate for candidate in members if candidate.type == kind]
    figure = new_figure(440 + 11 * len(lines))
    axes, losses, dense_lines, ladders = figure.subplots(), [0.0, 1.5 * margin], count(), count()
    for label, members in lines.items():
        is_dense = not any(candidate.ratio for candidate in members)
        grey = {"color": COLOURS["dense"], "linestyle": DASHES[1 + next(dense_lines) % 2]} if is_dense else None
        style = grey or curve_style(next(ladders))
        path = [_at(answer, candidate, candidate.smoothed) for candidate in members]
        # Points of dense models are drawn once.
        points = [_at(answer, candidate, candidate.loss) for candidate in members if candidate.ratio or is_dense]
        axes.plot(*xy(sorted(path)), **style, linewidth=2, label=label)
        axes.plot(*xy(points), "s" if is_dense else "o", color=style["color"], markersize=6)
        losses += [loss for _, loss in (*path, *points)]
    for candidate in (candidate for candidate in answer.candidates if candidate.type == "source"):
        point, label = _at(answer, candidate, candidate.loss), f"{names[candidate.base]}, the file as it is"
        axes.plot(*point, "D", color=COLOURS["ink"], markersize=6, label=label)
        losses.append(point[1])
    ring: Any = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgecolor": COLOURS["ink"]}
    if chosen := [answer.candidates[place] for place in answer.order]:
        ringed = xy([_at(answer, candidate, candidate.loss) for candidate in chosen])
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
    bases = list(dict.fromkeys(candidate.base for candidate in answer.candidates))
    short = [base.rstrip("/").rsplit("/", 1)[-1] for base in bases]
    return dict(zip(bases, short if len(set(short)) == len(bases) else bases, strict=True))


def _at(answer: Answer, candidate: CandidateFigures, loss: float) -> tuple[float, float]:
    return cost_of(answer, candidate.cost)[0], 100 * loss
