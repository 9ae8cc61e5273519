"""What torch's threads cost, alone and beside another process, by OpenMP's wait policy and the number of threads.

    python tests/performance/threads.py CHECKPOINT [--repeats 3]

Each cell is the time of the same work (forward and backward passes of packed rows) ÷ the time with all cores and the
default policy, alone. `busy`: beside a process that computes in Python on one core. `torch`: beside a process that does
the same work with the same settings. Settings take turns, so that a noisy machine slows all of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WORK = """
import sys, time, torch
from tailored_llama.models import load_model
torch.manual_seed(0)
model = load_model(__import__("pathlib").Path(sys.argv[1]), device="cpu")
ids = torch.randint(1000, (1, 384))
def work():
    with torch.inference_mode():
        model(ids, use_cache=False)
        for _ in range(16):
            model(ids[:, :1], use_cache=False)
    for _ in range(2):  # as tuning does: what is trained is small, and lies in every layer
        model(ids[:, :96], use_cache=False).logits.logsumexp(-1).sum().backward()
for name, parameter in model.named_parameters():
    parameter.requires_grad_("layernorm" in name)
work()
print("ready", flush=True)
while sys.stdin.readline():
    start = time.perf_counter()
    for _ in range(int(sys.argv[2])):
        work()
    print(time.perf_counter() - start, flush=True)
"""
BUSY = "while True: sum(range(10**6))"


class Worker:
    """A process that does the work each time it is asked, and says how long it took."""

    def __init__(self, checkpoint: str, rounds: int, setting: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, checkpoint, str(rounds)],
            env={**os.environ, **setting},
            stderr=subprocess.DEVNULL,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def ask(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(cores)}
    settings = {
        f"{cores} threads, default": threads,
        f"{cores} threads, OMP_WAIT_POLICY=passive": threads | {"OMP_WAIT_POLICY": "passive"},
        **{
            f"{cores} threads, GOMP_SPINCOUNT={n}": threads | {"GOMP_SPINCOUNT": str(n)}
            for n in (500, 1_000, 2_000, 5_000, 20_000, 50_000)
        },
        "1 thread": {"OMP_NUM_THREADS": "1"},
    }
    times: dict[tuple[str, str], list[float]] = {}
    for name, setting in settings.items():
        one, other = (Worker(options.checkpoint, options.rounds, setting) for _ in range(2))
        for _ in range(options.repeats):
            one.ask()
            times.setdefault((name, "alone"), []).append(float(one.answer()))
            busy = subprocess.Popen([sys.executable, "-c", BUSY])
            time.sleep(0.2)
            one.ask()
            times.setdefault((name, "busy"), []).append(float(one.answer()))
            busy.kill()
            busy.wait()
            one.ask()
            other.ask()
            pair = [float(one.answer()), float(other.answer())]
            times.setdefault((name, "torch"), []).append(max(pair))
        for worker in (one, other):
            worker.process.kill()
    whole = statistics.median(times[next(iter(settings)), "alone"])
    print(f"{'setting':<36}{'alone':>8}{'busy':>8}{'torch':>8}   (× {whole:.2f} s; median of {options.repeats})")
    for name in settings:
        cells = [statistics.median(times[name, beside]) / whole for beside in ("alone", "busy", "torch")]
        print(f"{name:<36}" + "".join(f"{cell:>8.2f}" for cell in cells))


if __name__ == "__main__":
    main()
