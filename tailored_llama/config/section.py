"""The base class of all sections of a configuration."""

from collections.abc import Iterator
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tailored_llama.errors import InputError, secret_in


class Section(BaseModel):
    """Base of every section: immutable, and unknown fields are errors; docstrings of fields are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    def contradictions(self) -> Iterator[str]:
        """Yield errors beyond the bounds of single fields, as messages; the first one refuses the section."""
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _has_no_secret(cls, value: Any) -> Any:
        if isinstance(value, str) and (told := secret_in(value)):
            raise PydanticCustomError("secret", "{told}", {"told": told})
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for message in self.contradictions():
            raise InputError(message)
        return self


S = TypeVar("S", bound=Section)


def narrow(section: Section, kind: type[S]) -> S:
    """The fields of a section that its base class `kind` has, so that a reader of it cannot read the others."""
    return kind.model_validate({name: getattr(section, name) for name in kind.model_fields})


def with_defaults(section: S, *names: str) -> S:
    """The same section with the named fields, which nothing reads, at their defaults."""
    fields = type(section).model_fields
    return section.model_copy(update={name: fields[name].get_default() for name in names})
