"""A picture of searches, one beside the other: what a base loses at each size, by removing and by fewer bits.

    python tests/performance/prune_or_quantise.py docs/images/prune-or-quantise.png \
        'Gemma 3 270M, CommonsenseQA=docs/results/search.csv' 'SmolLM2 135M, six fields=docs/results/fields-search.csv'

Each line is a type of file, from nothing removed on its right to the smallest candidate on its left.
"""

from pathlib import Path

import pandas as pd
import typer

from tailored_llama.reports.figures import Picture, curve_style, new_figure, styled

LOSS = "loss on the choosing rows, points"


@styled
def main(picture: Path, searches: list[str]) -> None:
    figure = new_figure(320)
    panels = figure.subplots(1, len(searches), sharey=True)
    for axes, given in zip(panels, searches, strict=True):
        title, _, file = given.partition("=")
        table = pd.read_csv(file)
        for nth, kind in enumerate(["q8_0", "q5_0", "iq4_nl"]):
            rows = table[table["type"] == kind].sort_values("MB")
            axes.plot(rows["MB"], rows[LOSS], marker="o", label=kind, **curve_style(nth))
        axes.set(title=title, xlabel="size of the file, MB")
        axes.grid(axis="y")
    panels[0].set_ylabel("points lost")
    panels[0].invert_yaxis()
    panels[-1].legend()
    Picture(figure, "Points lost over the size of the file, by type").save_png(picture)


if __name__ == "__main__":
    typer.run(main)
