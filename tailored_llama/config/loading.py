"""Loading of configurations: a TOML file and overrides, validated, with all problems in one line."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from tailored_llama.config.forms import is_row_file
from tailored_llama.config.resolving import resolved_fields
from tailored_llama.config.schema import RunConfig
from tailored_llama.config.section import Section
from tailored_llama.errors import InputError

Model = TypeVar("Model", bound=Section)
Run = TypeVar("Run", bound=RunConfig)


def load_config(
    path: str | Path | None, overrides: list[str] | None = None, kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """Read a configuration with overrides; its paths are relative to the working directory."""
    return build_config(kind, read_config_data(path, overrides))


def build_config(kind: type[Run], data: dict[str, Any]) -> Run:
    """Build a configuration of class `kind` from plain data: validate it first, then look into the files it names."""
    return resolve(validate_as(kind, data))


def resolve(config: Run) -> Run:
    """The same configuration with what the files of its benchmarks decide; itself if they decide nothing more.

    Raises:
        InputError: a file cannot be read or does not say what is needed, or contradicts the configuration.
    """
    tables = [resolved_fields(benchmark) for benchmark in config.benchmarks]
    if tables == [benchmark.model_dump(exclude_none=True) for benchmark in config.benchmarks]:
        return config
    return validate_as(type(config), config.model_dump(exclude_unset=True) | {"benchmarks": tables})


def read_config_data(path: str | Path | None, overrides: list[str] | None = None) -> dict[str, Any]:
    """A TOML file with overrides, such as tuning.epochs=5 or model.source=./my-model, applied, as plain data.

    InputError: the file is missing or not TOML, or an override has no value or no section.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"configuration {path}: {error.strerror}; allowed: a readable TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            if is_row_file(str(path)):
                told = f"allowed: a TOML file, or `tailored-llama smallest {path}`, which needs none"
                raise InputError(f"configuration {path}: not TOML, but a file of rows; {told}") from None
            raise InputError(f"configuration {path}: not TOML ({error})") from None
    for override in overrides or []:
        key, separator, value = map(str.strip, override.partition("="))
        if not separator or not key:
            raise InputError(f"--set {override!r}: allowed: key=value, such as tuning.epochs=5")
        try:
            assign(data, key, tomllib.loads(f"value = {value}")["value"])
        except tomllib.TOMLDecodeError:
            assign(data, key, value)
    return data


def setting(key: str, value: str | list[str]) -> str:
    """What sets a field to a text or texts, whatever characters they have."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}".replace(
        "\x7f", "\\u007f"
    )  # TOML allows all other characters


def validate_config(data: dict[str, Any]) -> RunConfig:
    """Build a RunConfig from plain data, as `build_config` does."""
    return build_config(RunConfig, data)


def validate_as(kind: type[Model], data: dict[str, Any]) -> Model:
    """Validate plain data as a `kind`, without opening any file; all problems go into one InputError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems: list[dict[str, Any]] = [
            {**p, "loc": tuple(part for part in p["loc"] if not _UNION_BRANCH.fullmatch(str(part)))}
            for p in error.errors()
        ]
        # If items of a list are invalid, pydantic also reports the list as too short. Report the items only.
        holders = {p["loc"][:depth] for p in problems for depth in range(len(p["loc"]))}
        raise InputError("; ".join(_explain(p, kind) for p in problems if p["loc"] not in holders)) from None


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted field of plain configuration data; InputError: a name before a dot is not a section."""
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise InputError(f"{key}: {section} is not a section")
    data[name] = value


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One problem as `field: got the value; allowed: the valid values`."""
    path = [str(part) for part in error["loc"]]
    field, context = ".".join(path), error.get("ctx", {})
    if isinstance(context.get("error"), InputError):
        return str(context["error"])  # names its field itself
    if error["type"] == "extra_forbidden":
        siblings = _siblings(path, kind)
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"allowed: {', '.join(siblings)}"
        return f"{field}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not field:
        return str(message)
    if error["type"] == "missing":
        return f"{field}: not set"
    if error["type"] == "secret":
        return f"{field}: {message}"
    for pattern, wording in _WORDING:
        message = re.sub(pattern, wording, message)
    return f"{field}: got {error['input']!r}; {message}"


_UNION_BRANCH = re.compile(r"str|constrained-int|(tuple|literal)\[.*\]|\[key\]")  # added to a problem's location
_WORDING = (
    (r"Input should be a valid (tuple|list)", "allowed: a list"),
    (r"Input should be a valid dictionary or instance of \w+", "allowed: a table"),
    (r"(Tuple|String|List|Dictionary) should have (.*?)( after validation, not \d+)?$", r"allowed: \2"),
    (r"String should match pattern", "allowed: text that matches"),
    (r"Input should be", "allowed:"),
)


def _siblings(path: list[str], section: type[BaseModel]) -> list[str]:
    """All fields of the section that holds the field at `path`."""
    for part in path[:-1]:
        if part in section.model_fields:
            section = next(_sections_in(section.model_fields[part].annotation), section)
    return list(section.model_fields)


def _sections_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _sections_in(inner)
