"""What busy-waiting costs: one training step alone, and two processes at once on the same cores, by GOMP_SPINCOUNT.

    python tests/benchmarks/threads.py

A 12-layer random Llama of hidden width 576, 240 tokens; the settings take turns, the median of three rounds is printed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

STEP = """
import time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=12,
                                     num_attention_heads=9, num_key_value_heads=3))
ids = torch.randint(0, 1024, (1, 240))
start, steps = time.perf_counter(), 0
while time.perf_counter() - start < 5:
    model(ids, labels=ids).loss.backward()
    steps += 1
print((time.perf_counter() - start) / steps)
"""
SETTINGS = {"default": {}, "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"}}


def seconds_per_step(processes: int, setting: dict[str, str]) -> float:
    command = [sys.executable, "-c", STEP]
    runs = [
        subprocess.Popen(command, env={**os.environ, **setting}, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return max(float(run.communicate()[0]) for run in runs)


def main() -> None:
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(3):
        for processes in (1, 2):
            for name, setting in SETTINGS.items():
                times.setdefault((name, processes), []).append(seconds_per_step(processes, setting))
    print(f"{'setting':24} alone  two at once   (seconds per step)")
    for name in SETTINGS:
        alone, together = (statistics.median(times[name, n]) for n in (1, 2))
        print(f"{name:24} {alone:5.2f}  {together:11.2f}")


if __name__ == "__main__":
    main()
