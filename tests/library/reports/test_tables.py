"""One table on every surface: what each shows of it, and that nothing in a cell is markup."""

from rich.console import Console

from tailored_llama.reports.figures import name_ticks, new_figure
from tailored_llama.reports.pages import Report, Section, from_template, shorten
from tailored_llama.reports.tables import Cell, Column, Table, as_text, markdown, table_row, terminal

TABLE = Table(
    (Column("name", left=True), Column("mean\naccuracy"), Column("only on\npages", wide=True)),
    (
        table_row("[bold]a|b <i>", Cell("0.500 ± 0.050", ("4–6 %", "over 2"), "0.500±.050"), "7"),
        table_row("Heading"),
        table_row("mean", "– failed"),
    ),
    ("A note with [brackets].",),
)


def test_a_terminal_shows_the_brief_cells_of_narrow_columns_and_the_notes() -> None:
    console = Console(width=80, record=True)
    console.print(terminal(TABLE))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "[bold]a|b <i> 0.500±.050" in lines
    assert "A note with [brackets]." in lines
    assert not any("pages" in line or "4–6" in line for line in lines)


def test_markdown_shows_all_with_markup_escaped() -> None:
    assert markdown(TABLE).replace("\N{NO-BREAK SPACE}", " ").splitlines() == [
        "| name | mean accuracy | only on pages |",
        "|:--|--:|--:|",
        "| [bold]a&#124;b &lt;i&gt; | 0.500 ± 0.050 (4 to 6 %; over 2) | 7 |",
        "| **Heading** |  |  |",
        "| mean | – failed |  |",
        "",
        "A note with [brackets].",
    ]


def test_no_text_from_outside_leads_out_of_a_page() -> None:
    assert as_text("![<b>](//example.com/x.png)") == "![&lt;b&gt;]&#40;//example.com/x.png)"
    assert as_text("see https://example.com") == "see https&#58;//example.com"
    assert as_text("[a]\n\n[a]: www.example.com") == "[a]\n\n[a]&#58; www&#46;example.com"


def test_a_name_in_a_heading_is_no_markup() -> None:
    page = from_template("page.md.j2", report=Report("my_model_*v2*\\", (), (), ()))
    assert page == "# my\\_model\\_\\*v2\\*\\\\\n"


def test_a_long_prompt_loses_its_middle() -> None:
    assert shorten("a question", 10) == "a question"
    assert shorten("instructions, many words, question", 16) == "instruct\n[… 18 characters left out …]\nquestion"


def test_names_below_bars_break_where_they_may_and_else_are_tilted() -> None:
    def shown(*names: str) -> list[tuple[str, float]]:
        axes = new_figure(300).subplots()
        name_ticks(axes, names, 120)
        return [(label.get_text(), label.get_rotation()) for label in axes.get_xticklabels()]

    assert shown("arc_easy", "customer-support-tickets-2026", "my.data_v2.csv") == [
        ("arc_easy", 0), ("customer-\nsupport-\ntickets-2026", 0), ("my.data_v2.\ncsv", 0),
    ]  # fmt: skip
    assert shown("arc_easy", "customersupporttickets") == [("arc_easy", 45), ("customersupporttickets", 45)]


def test_html_spans_what_a_short_row_leaves() -> None:
    page = from_template("page.html.j2", report=Report("A title", (), (), [Section("", table=TABLE)]), name="index")
    assert "[bold]a|b &lt;i&gt;" in page
    assert '<th colspan="3" class="text">Heading</th>' in page
    assert '<td colspan="2" class="text">– failed</td>' in page
    assert '<span class="under">4–6 %</span><span class="under">over 2</span>' in page
    assert '<p class="quiet">A note with [brackets].</p>' in page
