"""The notebook of the tutorials, run on the tiny model: only its first cell, the parameters, is another."""

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from helpers import save_worded_llama, words, write_jsonl
from tailored_llama.models import read_structure

NOTEBOOK = Path(__file__).parents[3] / "docs" / "tutorials" / "notebook.ipynb"
PARAMETERS = """\
import pandas as pd

model = "dense"
rows = {read}
ratio = 0.1386  # whole groups reach it
settings = {{
    "model.dtype": "float32", "calibration.samples": 4, "calibration.tokens": 32,
    "tuning.shots": 16, "tuning.held_out": 16, "tuning.epochs": 1,
}}
search = {{**settings, "pruning.ratios": [ratio], "goal.types": ["q8_0"]}}
margin = 40"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.parametrize("read", ['pd.read_csv("my.csv")', 'pd.read_json("my.jsonl", lines=True)'])
def test_it_runs_as_it_stands(notebook: nbformat.NotebookNode, read: str, tmp_path: Path) -> None:
    save_worded_llama(tmp_path / "dense", max_position_embeddings=512)
    texts = words(600).split(" ")
    rows = [{"text": f"{i} {texts[i]}", "label": "ab"[i % 2]} for i in range(300)]
    pd.DataFrame(rows).to_csv(tmp_path / "my.csv", index=False)
    roles = {"text": "user", "label": "assistant"}
    chats = [{"messages": [{"role": roles[key], "content": cell} for key, cell in row.items()]} for row in rows]
    write_jsonl(tmp_path / "my.jsonl", chats)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = PARAMETERS.format(read=read)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert read_structure(tmp_path / "small").parameters < read_structure(tmp_path / "dense").parameters
    assert (tmp_path / "small.gguf").stat().st_size > 0


def test_it_is_shown_with_what_it_printed(notebook: nbformat.NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = "".join(str(cell.outputs) for cell in cells)
    assert "107," in outputs  # million parameters are left of SmolLM2's 135
    assert "/home/" not in outputs
    assert "/tmp/" not in outputs
