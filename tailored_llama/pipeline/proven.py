"""The proof of a model that somebody has, repeated on the same rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from tailored_llama import data, evaluation, models, serving
from tailored_llama.config import OWN, ModelConfig, SmallestConfig, build_config, named_benchmark
from tailored_llama.errors import InputError
from tailored_llama.evaluation import Array, Compared, LossTest, Said, ScoreSettings
from tailored_llama.pipeline import stages, steps
from tailored_llama.pipeline.answers import ASKED, ASKED_SCHEMA, PROOF, PROOF_SCHEMA, answers_of, digest_of, said_of
from tailored_llama.pipeline.certificate import CertificateFile, Settings, parse_certificate
from tailored_llama.pipeline.executor import Executor
from tailored_llama.pipeline.graph import Artifact, Node
from tailored_llama.serving import GgufSettings
from tailored_llama.store import CERTIFICATE, MANIFEST, check_certified, is_hub_id, read_table

UNHASHED = (CERTIFICATE, models.CARD, MANIFEST)  # files from which nothing is loaded


@dataclass(frozen=True)
class Certificate:
    """A model's certificate, with the folder that it stands in, and a configuration of this model and the same rows."""

    folder: Path
    content: CertificateFile
    config: SmallestConfig

    @property
    def is_served(self) -> bool:
        """Whether llama.cpp answered with the file itself."""
        return self.config.goal.runtime == "llama.cpp"

    @property
    def weights(self) -> list[Path]:
        """The files of weights that would be loaded; InputError: there are none, or several GGUF files."""
        if not self.is_served:
            return models.weight_files(self.folder)
        if len(files := sorted(self.folder.glob("*.gguf"))) != 1:
            raise InputError(f"{self.folder}: got {len(files)} .gguf files; allowed: the one that was certified")
        return files

    def recorded(self, name: str) -> Sequence[Array]:
        """The rows of a benchmark, and the recorded answers of the reference and the model to them."""
        return self._rows(PROOF, PROOF_SCHEMA, name)

    def asked(self, name: str) -> Sequence[Array]:
        """The digests of what the reference answered and of the labels, by the rows of a benchmark's proof."""
        return self._rows(ASKED, ASKED_SCHEMA, name)

    def _rows(self, file: str, schema: pa.Schema, name: str) -> Sequence[Array]:
        table = read_table(self.folder / file, schema)
        rows = table["benchmark"].to_numpy() == name
        return [table[column].to_numpy()[rows] for column in schema.names[1:]]

    def compare(self, name: str, scores: Path, prompts: Path, dense: Path | None = None) -> Compared:
        """Compare new scores of the model with the reference, by new scores of that (`dense`) or as it was recorded.

        Labels that were asked for are the recorded ones. InputError: the recorded rows are others.
        """
        test, (examples, recorded, _) = self.content.benchmarks[name], self.recorded(name)
        said = said_of(self.config, name, scores, prompts)
        if not np.array_equal(examples, said.examples[: test.rows]):
            raise InputError(f"{self.folder / PROOF}: got other rows of {name}; allowed: the proving rows")
        if not test.looks:
            after = answers_of(self.config, name, scores, prompts)
            before = answers_of(self.config, name, dense, prompts) if dense else replace(after, values=recorded)
            return Compared(before, after, np.zeros(len(examples), dtype=bool))
        reference, labels = self.asked(name)
        if dense:
            reference = _digests(said_of(self.config, name, dense, prompts), test.rows)
        known = {row: label for row, label in zip(examples.tolist(), labels, strict=True) if label is not None}
        small = Said(examples, _digests(said, test.rows))
        return evaluation.compare_said(Said(examples, reference), small, known)

    def test(self, name: str, compared: Compared) -> LossTest:
        """Test a model as it was tested, at the same look if labels were asked for."""
        stated = self.content.benchmarks[name]
        nominal, margin = stated.nominal if stated.looks else None, self.config.goal.tested_margin
        return evaluation.noninferiority_test(compared.dense, compared.small, margin, self.content.level, nominal)


def _digests(said: Said, rows: int) -> Array:
    return np.array([digest_of(form) for form in said.answers[:rows]], dtype=object)


def read_certificate(folder: Path, files: Sequence[str] | None) -> Certificate:
    """Read a model's certificate, and check that it agrees with itself and with the files beside it.

    `files` are the user's own rows, in the order of their benchmarks.

    Raises:
        InputError: there is no certificate; it is refused, as in `parse_certificate`; or a file is missing or another.
    """
    file = folder / CERTIFICATE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; allowed: the folder of a proven model") from None
    stated = parse_certificate(content, str(file))
    certificate = Certificate(folder, stated, _config_of(stated, folder, files or ()))
    _check_files(certificate)
    for name, test in stated.benchmarks.items():
        _, dense, small = certificate.recorded(name)
        if not np.all((dense >= 0) & (dense <= 1) & (small >= 0) & (small <= 1)):
            raise InputError(f"{folder / PROOF}: got other answers on {name}; allowed: numbers from 0 to 1")
        for fault in stated.faults(f"benchmarks.{name}", name, test, (dense, small)):
            raise InputError(f"{file}: {fault}")
        if test.looks:
            _, labels = certificate.asked(name)
            without = np.array([label is None for label in labels])
            if len(labels) != test.rows or (missing := int(np.sum(without & (dense > small)))) != test.missing:
                told = f"{len(labels)} rows" if len(labels) != test.rows else f"{missing} rows without a label"
                allowed = f"{test.rows} rows, {test.missing} without a label that count as lost"
                raise InputError(f"{folder / ASKED}: got {told} of {name}; allowed: {allowed}")
    return certificate


def _config_of(stated: CertificateFile, folder: Path, files: Sequence[str]) -> SmallestConfig:
    """A configuration that asks the certified rows, with the user's files in place of those that were named."""
    run = stated.run
    template = named = str(run.prompts.get("template"))
    if named in stated.model.sha256:
        template = str(folder / named)
    elif named not in data.shipped():
        allowed = f"{', '.join(data.shipped())}, or a file that model.sha256 lists"
        raise InputError(f"run.prompts.template: got {named!r}; allowed: {allowed}")
    settings = {
        "benchmarks": _with_files(run.benchmarks, files, bool(run.scoring.get("num_fewshot"))),
        "seed": run.seed,
        "prompts": {"template": template},
        "scoring": run.scoring,
        "model": {"source": str(folder), "dtype": run.model.get("dtype")},
        "goal": {
            "lose_at_most": stated.margin_points,
            "confidence": stated.confidence,
            "label_errors": stated.label_errors,
            "runtime": run.goal.get("runtime"),
        },
    }
    config = build_config(SmallestConfig, settings)
    metrics = {benchmark.name: data.headline_metric(benchmark) for benchmark in config.benchmarks}
    expected = {"metrics": metrics, "template": named, "num_fewshot": config.scoring.num_fewshot}
    if stated.scoring != expected:
        raise InputError(f"scoring: got {str(stated.scoring)[:500]}; allowed: {expected}, by run")
    return config


def _with_files(benchmarks: Sequence[Settings], files: Sequence[str], with_shots: bool) -> list[Settings]:
    """Tables of benchmarks with the user's files, in their order, in place of all files that they name."""
    tables, slots = [dict(table) for table in benchmarks], list[tuple[Settings, str]]()
    for table in tables:
        if (source := table.get("source")) is None:
            other = table.get("unlabelled") not in (None, OWN)
            keys = ["data", *(["unlabelled"] if other else []), "evaluation", "train"]
            if not with_shots:
                table["train"] = None  # only solved examples come from there
        elif is_hub_id(str(source)):
            keys = []
        else:
            raise InputError(f"run.benchmarks.source: got {source!r}; allowed: a data set of the Hub")
        slots += [(table, key) for key in keys if table.get(key) is not None]
    if len(slots) != len(files):
        named = ", ".join(repr(str(table[key])) for table, key in slots)
        allowed = f"{len(slots)} in the place of {named}" if slots else "none"
        raise InputError(f"rows: got {len(files)} files; allowed: {allowed}")
    for (table, key), file in zip(slots, files, strict=True):
        table[key] = file
    return tables


def _check_files(certificate: Certificate) -> None:
    """Check that the files of a model are those that are certified, and all that are certified."""
    folder, stated = certificate.folder, certificate.content
    check_certified(folder, stated.model.sha256, stated.model.sha256)
    files = [file for file in folder.rglob("*") if file.is_file()]
    unhashed = {*stated.model.sha256, *UNHASHED}
    names = (file.relative_to(folder).as_posix() for file in files)
    check_certified(folder, (name for name in names if name not in unhashed and not name.startswith(".")), {})
    if stated.model.bytes != (size := sum(file.stat().st_size for file in certificate.weights)):
        raise InputError(f"model.bytes: got {stated.model.bytes:,}; allowed: {size:,}, the size of its weights")


def verify_certificate(run: Executor, certificate: Certificate, dense: str | None = None) -> dict[str, LossTest]:
    """Score a certified model again on its proving rows, and test it again; returns the tests by benchmark.

    `dense` is the reference, to be scored again as well; None: its recorded answers are taken.

    Raises:
        InputError: the rows are not those of the certificate.
    """
    small, tests = _asked(certificate), dict[str, LossTest]()
    model = certificate.config.model.model_copy(update={"source": dense})
    reference = steps.load_dense(certificate.config.model_copy(update={"model": model})) if dense else None
    file = _as_certified(certificate, model, reference) if reference and certificate.is_served else None
    for name, prompts in certified_rows(run, certificate):
        after = run.open(_scored(certificate, name, small, certificate.folder, prompts))
        before = run.open(_scored(certificate, name, reference, file, prompts)) if reference else None
        tests[name] = certificate.test(name, certificate.compare(name, after, run.open(prompts), before))
    return tests


def _scored(
    certificate: Certificate, name: str, checkpoint: Artifact, gguf: Artifact | None, prompts: Artifact
) -> Node:
    """The scores of a model, which is asked as the certified one was, whichever it is."""
    if not certificate.is_served:
        return steps.score(certificate.config, name, "again", checkpoint, prompts)
    settings, title = ScoreSettings.of(named_benchmark(certificate.config, name)), f"score {name} again"
    assert gguf is not None
    return stages.served(title, settings=settings, checkpoint=checkpoint, gguf=gguf, prompts=prompts)


def _as_certified(certificate: Certificate, model: ModelConfig, dense: Artifact) -> Node:
    """A reference as a file of 16 bits, with the chat template, grammar and schema that the certified file has."""
    settings = GgufSettings(serving.whole_type(models.find_model(model)), "reference")
    return stages.gguf("write the reference", settings=settings, checkpoint=dense, prompts={"": certificate.folder})


def certified_rows(run: Executor, certificate: Certificate) -> Iterator[tuple[str, Artifact]]:
    """The benchmarks of a certificate with the prompts of their proving rows; InputError: they are other rows."""
    config = certificate.config
    for benchmark in config.benchmarks:
        name = benchmark.name
        examples = steps.load_examples(benchmark)
        prompts = steps.render(config, name, "evaluation", examples, dense=_asked(certificate))
        digest = data.rows_digest(data.read_prompts(run.open(prompts), "evaluation"))
        if digest != (expected := certificate.content.sets[name]["proving"].sha256):
            allowed = f"{expected[:12]}…, the rows that the certificate is of"
            raise InputError(f"{name}: its proving rows have SHA-256 {digest[:12]}…; allowed: {allowed}")
        yield name, prompts


def _asked(certificate: Certificate) -> Node:
    """The certified model; of a file that llama.cpp answers with, its tokenizer alone."""
    if certificate.is_served:
        return stages.tokenizer("read the tokenizer", gguf=certificate.folder)
    return steps.load_dense(certificate.config)


def uncovered(certificate: Certificate, dense: bool) -> list[str]:
    """What `verify_certificate` cannot say; `dense`: the reference was scored again."""
    content = certificate.content
    asked, tests = {own.asked for own in content.served.values()}, content.benchmarks.values()
    reference = f"the answers of the reference ({content.reference}), which are the recorded ones"
    limits = {
        f"{reference}: --dense MODEL scores it again": not dense,
        "whether the rows have the right answers, and are like your texts": True,
        "the labels that were asked for, which are the recorded ones": any(t.looks for t in tests),
        "whether the model was tuned or chosen on them": True,
        f"how often they were opened, beyond opening {content.opening} in the record of {content.record}": True,
        "the model card, and what the certificate says in words": True,
        "answers in the model's own words, as choices are ranked": "log-likelihoods" in asked,
        "a server of your own: --url URL asks it": True,
    }
    return [limit for limit, applies in limits.items() if applies]
