"""What `benchmark data` measures with: text that is the same everywhere, ids compared one by one, honest arithmetic."""

import json
import unicodedata

import numpy as np
import pytest

from megatron_speech.benchmark.data_codes import FORMS
from megatron_speech.benchmark.data_corpus import BenchmarkCorpus
from megatron_speech.benchmark.data_sizes import plan
from megatron_speech.benchmark.data_text import compare_ids
from megatron_speech.benchmark.measure import Measured, marginal_rates, run_measured
from megatron_speech.cli import main
from megatron_speech.environment import prepare_imports
from megatron_speech.errors import InputError
from megatron_speech.tokens.normalization import normalize_document


@pytest.fixture(scope="module")
def corpus():
    return BenchmarkCorpus("transcripts", seed=4)


@pytest.mark.slow
def test_a_document_depends_on_its_number_alone(corpus):
    whole = list(corpus.documents(40))
    assert list(corpus.documents(15, start=10)) == whole[10:25]
    assert list(BenchmarkCorpus("transcripts", seed=5).documents(40)) != whole


@pytest.mark.slow
def test_the_text_is_normalised_and_of_several_scripts(corpus):
    texts = list(corpus.documents(200))
    assert all(text == unicodedata.normalize("NFC", text) == normalize_document(text) for _, text in texts)
    assert len({script for script, _ in texts}) == 6


def write(prefix, documents):
    prepare_imports()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.slow
def test_ids_are_compared_document_by_document(tmp_path):
    write(tmp_path / "ours", [[1, 7, 8, 2], [1, 9, 2], [1, 5, 5, 2]])
    write(tmp_path / "same", [[7, 8, 0], [9, 0], [5, 5, 0]])
    write(tmp_path / "other", [[7, 8, 0], [9, 0], [5, 6, 0]])
    write(tmp_path / "longer", [[7, 8, 0], [9, 9, 0], [5, 5, 0]])
    write(tmp_path / "fewer", [[7, 8, 0]])
    assert compare_ids(tmp_path / "ours", tmp_path / "same")["identical"]
    for name, differing in (("other", 1), ("longer", 1), ("fewer", None)):
        found = compare_ids(tmp_path / "ours", tmp_path / name)
        assert not found["identical"] and found["differing_documents"] == differing


def test_start_up_is_subtracted_once():
    measured = [Measured(12.0, 11.0, 1 << 20, "")] * 3
    idle = [Measured(2.0, 1.0, 1 << 10, ""), Measured(2.0, 1.0, 1, ""), Measured(90.0, 80.0, 1, "")]
    rates = marginal_rates(1000, measured, idle)
    assert rates["per_cpu_second"]["median"] == pytest.approx(100)
    assert rates["per_second"]["median"] == pytest.approx(100)


def test_a_plan_is_the_constants_times_the_documents():
    constants = {"tokens_per_document": 500.0, "bytes_per_document": {".bin": 2000.0}, "cpu_seconds_per_document": 1e-5}
    needs = plan({"mean_seconds": 9.0, "tasks": {"tts": constants}}, 1000)
    assert needs["documents"] == 400_000 and needs["shards"] == 1
    assert needs["tasks"]["tts"]["bytes"][".bin"] == 800_000_000
    assert needs["tasks"]["tts"]["core_hours"] == pytest.approx(4 / 3600)


def test_a_tool_that_fails_is_quoted():
    with pytest.raises(InputError, match="status 3:\nno such thing"):
        run_measured(["sh", "-c", "echo no such thing; exit 3"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_codes_is_made(form, tmp_path):
    assert FORMS[form](tmp_path, 3, 0).stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "text,video"], "--only names 'video'"),
        (["--repetitions", "2"], "--repetitions is 2"),
        (["--peer-repository", "."], "no tools/preprocess_data.py"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message, capsys):
    assert main(["benchmark", "data", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_codes_are_measured_end_to_end(tmp_path, monkeypatch):
    from megatron_speech.benchmark import data_codes

    monkeypatch.setattr(data_codes, "FORMS", {"npy with offsets": FORMS["npy with offsets"]})
    command = ["benchmark", "data", "--only", "codes", "--documents", "1000", "--json", str(tmp_path / "f.json")]
    assert main([*command, "--work-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "f.json").read_text())
    form = report["codes"]["forms"]["npy with offsets"]
    assert form["codes"] == 500_000 and form["per_cpu_second"]["min"] > 0
    assert {"date", "machine", "environment", "options"} <= report.keys()
