"""How many tasks of lm-evaluation-harness can be benchmarks, and why the others cannot: by their files alone.

Run: python tests/performance/harness_tasks.py
"""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tailored_llama.config import PREFIX, find_task, task_fields
from tailored_llama.config.harness import _shipped
from tailored_llama.errors import InputError


def main() -> None:
    harness = find_spec("lm_eval")
    assert harness is not None
    assert harness.submodule_search_locations is not None
    tasks, _ = _shipped(Path(harness.submodule_search_locations[0]) / "tasks")
    kinds: Counter[str] = Counter()
    for name in tasks:
        try:
            task = find_task(f"{PREFIX}{name}", None)
            fields = task_fields(task)
            kinds[f"yes: {fields['metric']}, {'with' if task.has_train else 'without'} a train split"] += 1
        except InputError as error:
            reason = str(error).removeprefix(f"benchmarks.{PREFIX}{name}: ").partition("; allowed")[0]
            kinds[f"no: {re.sub(r'utils[.].*', 'of its own', reason)}"] += 1
    for kind, count in kinds.most_common():
        print(f"{count:6,}  {kind}")
    print(f"{len(tasks):6,}  tasks, of which {sum(n for k, n in kinds.items() if k.startswith('yes')):,} can be")


if __name__ == "__main__":
    main()
