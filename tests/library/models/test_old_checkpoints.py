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
import torch
from transformers import AutoModelForCausalLM

def load(module, trust):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)
    assert type(model).__module__.startswith(module), type(model).__module__
    with torch.no_grad():
        print(json.dumps(model(torch.arange(1, 9)[None]).logits[0, -1, :8].tolist()))

sys.modules["tailored_llama"] = None
load("transformers_modules.", True)
del sys.modules["tailored_llama"]
import tailored_llama
load("tailored_llama.", False)
"""


def test_it_loads(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(CHECKPOINT)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    recorded = json.loads((CHECKPOINT / "logits.json").read_text())
    without, beside = map(json.loads, run.stdout.splitlines())
    assert without == pytest.approx(recorded, abs=2e-5)
    assert beside == pytest.approx(recorded, abs=2e-5)
