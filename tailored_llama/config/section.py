"""What all sections of a configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
