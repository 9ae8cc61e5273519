"""Files rounded for a job: ggml's own blocks with other codes, less error on the job, and llama.cpp reads them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import load_file

import helpers
from llama_cpp import llama_cpp, with_ggml_gelu
from llama_server import llama_server
from tailored_llama.config import ExecutionConfig, GgufType
from tailored_llama.errors import InputError
from tailored_llama.models import Document, load_model, read_config
from tailored_llama.serving import write_gguf
from tailored_llama.serving.export import dequantise
from tailored_llama.serving.gguf_writing import Array
from tailored_llama.serving.imatrix import Importance, read_importance, write_importance
from tailored_llama.serving.job import Job, importance_of
from tailored_llama.serving.llama_cpp import quantise_rows
from tailored_llama.serving.rounding import _CODES, rounded, with_codes

IDS = [5, 9, 200, 31, 77, 14, 3, 8]
kinds = pytest.mark.parametrize("kind", list(_CODES), ids=lambda kind: kind.name)
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


def weights_and_moments(seed: int, rows: int = 24, inputs: int = 512) -> tuple[Array, torch.Tensor]:
    """A matrix, and the moments of inputs of very different sizes that go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(200, inputs)) @ rng.normal(size=(inputs, inputs)) * np.exp(rng.normal(size=inputs))
    return rng.normal(size=(rows, inputs)).astype(np.float32), torch.from_numpy(mixed.T @ mixed / 200).float()


def error(values: Array, rows: Array, kind: Kind, moments: torch.Tensor) -> float:
    off = torch.from_numpy(dequantize(rows, kind) - values).double()
    return float(((off @ moments.double()) * off).sum())


@kinds
def test_ggml_s_own_codes_packed_again_are_ggml_s_own_bytes(kind: Kind) -> None:
    values, moments = weights_and_moments(0)
    for importance in (None, moments.diagonal().numpy().copy()):
        rows = quantise_rows(values, kind, importance)
        grid = np.stack([
            dequantize(with_codes(rows, kind, np.full(values.shape, code, np.uint8)), kind)
            for code in range(len(_CODES[kind][0]))
        ])  # fmt: skip
        codes = np.abs(grid - dequantize(rows, kind)).argmin(0).astype(np.uint8)
        assert np.array_equal(dequantize(with_codes(rows, kind, codes), kind), dequantize(rows, kind))
        steps = np.diff(grid, axis=0) / np.diff(_CODES[kind][0])[:, None, None]
        assert np.allclose(steps, steps[0], atol=1e-5)  # so that two codes tell all of them


@kinds
@pytest.mark.parametrize("seed", range(3))
def test_errors_on_the_job_are_never_above_plain_rounding_s(kind: Kind, seed: int) -> None:
    values, moments = weights_and_moments(seed)
    found = error(values, rounded(values, kind, moments), kind, moments)
    for importance in (None, moments.diagonal().numpy().copy()):
        assert found < 0.5 * error(values, quantise_rows(values, kind, importance), kind, moments)


def test_inputs_that_are_always_zero_and_rows_of_zeros_are_rounded_too() -> None:
    values, moments = weights_and_moments(0, inputs=64)
    values[3], moments[40:], moments[:, 40:] = 0, 0, 0
    for known in (moments, torch.zeros_like(moments)):
        back = dequantize(rounded(values, Kind.Q4_0, known), Kind.Q4_0)
        assert np.isfinite(back).all()
        assert not back[3].any()


def job(**execution: Any) -> Job:
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(0, 256, (12, 40), generator=generator).tolist()
    documents = [Document([256, *text[:25]], [text[25:31], text[31:]]) for text in texts]
    return Job("my-task", documents, ExecutionConfig(device="cpu", **execution))


def tiny(folder: Path, **changes: Any) -> Path:
    return helpers.add_merge(helpers.save_tiny_llama(folder, **changes))


def llama(folder: Path) -> Path:
    return tiny(folder, noise=0.1, **(WIDE | {"intermediate_size": 33}))


def gemma(folder: Path) -> Path:
    changes = WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 4, "num_hidden_layers": 7}
    return tiny(folder, architecture="gemma3_text", noise=0.1, **changes)


def phi3(folder: Path) -> Path:
    changes = WIDE | {"pad_token_id": 0, "sliding_window": None, "tie_word_embeddings": False}
    return tiny(folder, architecture="phi3", noise=0.1, **changes)


def k_wide(folder: Path) -> Path:
    sizes = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 96}
    return tiny(folder, num_hidden_layers=2, initializer_range=0.05, **sizes)


@pytest.mark.parametrize(
    ("make", "gguf_type", "expected"),
    [
        (llama, "q4_0", {"Q4_0"}),
        (llama, "iq4_nl", {"IQ4_NL"}),
        (llama, "q5_1", {"Q5_1"}),
        (gemma, "iq4_nl", {"IQ4_NL"}),
        (phi3, "q5_0", {"Q5_0", "Q8_0"}),  # an embedding that is no head
        (k_wide, "q3_k", {"Q3_K", "IQ4_NL"}),
        (k_wide, "q4_k", {"Q4_K", "IQ4_NL"}),
        (k_wide, "q5_k", {"Q5_K", "Q5_0"}),
        (k_wide, "q6_k", {"Q6_K", "Q8_0"}),
    ],
)
def test_a_file_for_a_job_is_nearer_to_the_model_and_is_what_llama_cpp_computes_with(
    tmp_path: Path, make: Callable[[Path], Path], gguf_type: GgufType, expected: set[str]
) -> None:
    checkpoint = make(tmp_path / "model")
    alike = np.ones(read_config(checkpoint)["hidden_size"], np.float32)
    plain = Importance("alike", 1, {"token_embd.weight": alike, "output.weight": alike})
    files: dict[str, Importance | Job] = {"plain": plain, "job": job()}
    states = torch.tensor([[*document.prefix] for document in job().documents])
    whole, off = load_model(checkpoint), dict[str, float]()
    for name, by in files.items():
        write_gguf(checkpoint, gguf_type=gguf_type, out=tmp_path / f"{name}.gguf", by=by)
        (back := tmp_path / name).mkdir()
        dequantise(checkpoint, tmp_path / f"{name}.gguf", back)
        with torch.no_grad():
            off[name] = float((load_model(back)(states).logits - whole(states).logits).norm())
    matrices = [t for t in GGUFReader(tmp_path / "job.gguf").tensors if t.tensor_type != Kind.F32]
    assert {t.tensor_type.name for t in matrices} == expected  # the embedding, too
    assert off["job"] < off["plain"]
    with llama_cpp(tmp_path / "job.gguf") as runtime, torch.no_grad():
        model = load_model(tmp_path / "job")
        ours = (with_ggml_gelu(model) if make is gemma else model)(torch.tensor([IDS])).logits[0]
        assert (runtime.logits(IDS) - ours).norm() < 0.08 * ours.norm()  # llama.cpp rounds states, too


def test_a_file_says_what_it_was_rounded_for_and_one_without_a_job_says_nothing(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path / "model")
    write_gguf(checkpoint, gguf_type="q4_0", out=tmp_path / "job.gguf", by=job())
    write_gguf(checkpoint, gguf_type="q4_0", out=tmp_path / "plain.gguf")
    fields = GGUFReader(tmp_path / "job.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("quantize.")}
    matrices = 4 * 7 + 1
    assert found == {
        "quantize.imatrix.dataset": "my-task",
        "quantize.imatrix.entries_count": matrices,
        "quantize.imatrix.chunks_count": 12,
    }
    plain = GGUFReader(tmp_path / "plain.gguf")
    assert not [key for key in plain.fields if key.startswith("quantize.")]
    assert {t.name: t.tensor_type.name for t in plain.tensors}["token_embd.weight"] == "Q8_0"


def test_a_streamed_model_is_rounded_alike(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path / "model")
    for streaming in ("never", "always"):
        out = tmp_path / f"{streaming}.gguf"
        write_gguf(checkpoint, gguf_type="iq4_nl", out=out, by=job(streaming=streaming))
    assert (tmp_path / "never.gguf").read_bytes() == (tmp_path / "always.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["always.gguf", "never.gguf"]


def test_llama_cpp_s_server_runs_a_file_for_a_job(tmp_path: Path) -> None:
    write_gguf(llama(tmp_path / "model"), gguf_type="iq4_nl", out=tmp_path / "job.gguf", by=job())
    with llama_server(tmp_path / "job.gguf") as server:
        assert server.ask("/completion", {"prompt": "ab", "n_predict": 4})["tokens_predicted"] == 4


# Importance matrices of llama.cpp


def test_an_importance_matrix_is_written_and_read_and_rounds_by_it(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path / "model")
    made = importance_of(job(), checkpoint, tmp_path)
    write_importance(made, tmp_path / "my.gguf")
    read = read_importance(tmp_path / "my.gguf")
    assert (read.dataset, read.chunks, read.file) == ("my-task", 12, "my.gguf")
    assert made.squares.keys() == read.squares.keys()
    assert all(np.allclose(own, read.squares[name], rtol=1e-6) for name, own in made.squares.items())
    assert {len(own) for name, own in made.squares.items() if "ffn_down" in name} == {33}  # without padding
    write_gguf(checkpoint, gguf_type="q4_0", out=tmp_path / "model.gguf", by=read)
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["quantize.imatrix.file"].contents() == "my.gguf"
    stored = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"].numpy()
    (gate,) = (t for t in reader.tensors if t.name == "blk.0.ffn_gate.weight")
    expected = quantise_rows(np.pad(stored, ((0, 31), (0, 0))), Kind.Q4_0, read.squares[gate.name])
    assert np.array_equal(gate.data, expected)


def test_an_embedding_without_importance_stays_in_eight_bits(tmp_path: Path) -> None:
    checkpoint = llama(tmp_path / "model")
    made = importance_of(job(), checkpoint, tmp_path)
    layers = {name: own for name, own in made.squares.items() if name.startswith("blk.")}
    write_gguf(checkpoint, gguf_type="q4_0", out=tmp_path / "model.gguf", by=replace(made, squares=layers))
    kinds = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_q.weight"]) == (Kind.Q8_0, Kind.Q4_0)
    other = replace(made, squares={"blk.9.attn_q.weight": np.ones(64)}, file="my.gguf")
    with pytest.raises(InputError, match=r"my.gguf: got no matrix of .*model; allowed: an importance matrix of this"):
        write_gguf(checkpoint, gguf_type="q4_0", out=tmp_path / "other.gguf", by=other)


def test_llama_cpp_itself_quantises_by_a_job_s_importance_matrix(tmp_path: Path) -> None:
    checkpoint = k_wide(tmp_path / "model")
    write_gguf(checkpoint, gguf_type="q4_k_m", out=tmp_path / "plain.gguf")
    write_gguf(checkpoint, gguf_type="q4_k_m", out=tmp_path / "job.gguf", by=job())
    plain, by_job = (
        {t.name: t.data for t in GGUFReader(tmp_path / name).tensors} for name in ("plain.gguf", "job.gguf")
    )
    assert {name for name in plain if not np.array_equal(plain[name], by_job[name])} > {"blk.0.ffn_gate.weight"}
    assert GGUFReader(tmp_path / "job.gguf").fields["quantize.imatrix.dataset"].contents() == "my-task"


@pytest.mark.parametrize(
    ("squares", "message"),
    [
        ({}, "got no importance matrix"),
        ({"blk.0.attn_q.weight": np.full(64, np.nan)}, "got no mean squares of inputs"),
        ({"blk.0.attn_q.weight": np.full(64, -1.0)}, "got no mean squares of inputs"),
    ],
)
def test_what_is_no_importance_matrix_is_refused(tmp_path: Path, squares: dict[str, Array], message: str) -> None:
    write_importance(Importance("text", 1, squares), tmp_path / "my.gguf")
    with pytest.raises(InputError, match=message):
        read_importance(tmp_path / "my.gguf")


def test_a_cut_importance_matrix_and_that_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint, other = llama(tmp_path / "model"), helpers.save_tiny_llama(tmp_path / "other")
    write_importance(importance_of(job(), checkpoint, tmp_path), tmp_path / "my.gguf")
    with pytest.raises(InputError, match=r"my.gguf: .*: got 64 inputs; allowed: 32, as in the checkpoint"):
        write_gguf(
            helpers.add_merge(other),
            gguf_type="q4_0",
            out=tmp_path / "x.gguf",
            by=read_importance(tmp_path / "my.gguf"),
        )
    assert not (tmp_path / "x.gguf").exists()
    data = (tmp_path / "my.gguf").read_bytes()
    (tmp_path / "my.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a complete GGUF file"):
        read_importance(tmp_path / "my.gguf")
