"""From rows to tokens: benchmarks, template sets, prompts, texts and calibration sequences."""

from tailored_llama.data import benchmarks, calibration, prompts, worked_example
from tailored_llama.data.benchmarks import Example, headline_metric
from tailored_llama.data.builtin import BUILTIN
from tailored_llama.data.calibration import read_calibration, sequences_at_once
from tailored_llama.data.checks import check_benchmark
from tailored_llama.data.custom import named_columns
from tailored_llama.data.encoding import Encoded, encode_answer, encode_prompt, shared_header
from tailored_llama.data.likelihoods import loglikelihoods
from tailored_llama.data.prompts import Prompt, PromptSplit, RenderedSplit, read_prompts, render
from tailored_llama.data.selection import select_train, without
from tailored_llama.data.splits import Split
from tailored_llama.data.templates import candidates, layout_of, load_template, study_templates
from tailored_llama.data.texts import check_text, load_texts, text_identity

__all__ = [
    "BUILTIN", "Encoded", "Example", "Prompt", "PromptSplit", "RenderedSplit", "Split", "benchmarks",
    "calibration", "candidates", "check_benchmark", "check_text", "encode_answer", "encode_prompt", "headline_metric",
    "layout_of", "load_template", "load_texts", "loglikelihoods", "named_columns", "prompts", "read_calibration",
    "read_prompts", "render", "select_train", "sequences_at_once", "shared_header",
    "study_templates", "text_identity", "without", "worked_example",
]  # fmt: skip
