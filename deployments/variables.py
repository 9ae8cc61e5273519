"""Check the variables of deploy.sh before anything is made on a server: python -m deployments.variables"""

import os
import re
import sys
from collections.abc import Mapping
from zoneinfo import available_timezones


def wrong_variable(variables: Mapping[str, str]) -> str | None:
    """What is wrong with the first variable that has no allowed value; None: all have one, or are absent."""
    checks = {
        "GPUS": (re.compile(r"0*[1-9][0-9]*").fullmatch, "a whole number from 1"),
        "DEVICE": (re.compile(r"cpu|balanced|cuda(:[0-9]+)?").fullmatch, "cpu, cuda, cuda:N or balanced"),
        "TIMEZONE": (available_timezones().__contains__, "UTC, or a name such as Europe/Berlin"),
    }
    for name, (is_allowed, allowed) in checks.items():
        value = variables.get(f"TAILORED_LLAMA_{name}")
        if value is not None and not is_allowed(value):
            return f"TAILORED_LLAMA_{name}: got {value!r}; allowed: {allowed}"
    return None


if __name__ == "__main__":
    if wrong := wrong_variable(os.environ):
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(2)
