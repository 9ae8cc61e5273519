"""A per-layer checkpoint that commit 1dcd201 wrote loads as it did then, with the library and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).with_name("checkpoint-1dcd201")
LOAD = """
import json, sys
{first}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})
assert type(model).__module__.startswith({module!r}), type(model).__module__
with torch.no_grad():
    print(json.dumps(model(torch.arange(1, 9)[None]).logits[0, -1, :8].tolist()))
"""


@pytest.mark.parametrize(
    ("first", "trust", "module"),
    [
        ("import tailored_llama", False, "tailored_llama."),
        ("sys.modules['tailored_llama'] = None", True, "transformers_modules."),
    ],
    ids=["with the library", "without it"],
)
def test_it_loads(tmp_path: Path, first: str, trust: bool, module: str) -> None:
    code = LOAD.format(first=first, trust=trust, module=module)
    run = subprocess.run(
        [sys.executable, "-c", code, str(CHECKPOINT)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    recorded = json.loads((CHECKPOINT / "logits.json").read_text())
    assert json.loads(run.stdout) == pytest.approx(recorded, abs=2e-5)
