import json

import pytest

from dirotq.dirotq_core.report import REPORT_NAME, QuantizationReport
from dirotq.dirotq_core.solve import LinearReport


@pytest.fixture
def report():
    return QuantizationReport(
        "dirotq",
        4,
        [
            LinearReport("a", 512, 0.9, 21.5, None, 36.0),
            LinearReport("b", 512, None, 20.0, "few tokens", 30.0),
            LinearReport("c", 0, 0.5, 19.25, "few tokens", 31.0),
            LinearReport("d", 7, None, 18.0, "damping raised to 0.1", None),
        ],
    )


def test_round_trip(report, tmp_path):
    path = report.save(tmp_path)
    assert path == tmp_path / REPORT_NAME
    assert QuantizationReport.load(tmp_path) == report
    assert QuantizationReport.load(str(tmp_path)) == report


def test_the_file_is_plain_json_with_the_summary(report, tmp_path):
    body = json.loads(report.save(tmp_path).read_text(encoding="utf-8"))
    assert body["median_output_db"] == 31.0
    assert [row["name"] for row in body["linears"]] == list("abcd")


def test_the_median_is_of_what_was_measured(report):
    assert report.median_output_db == 31.0
    assert QuantizationReport("rtn", 8).median_output_db is None


def test_notes_are_grouped(report):
    assert report.notes() == ["few tokens (2 linears, first b)", "damping raised to 0.1 (1 linear, first d)"]


def test_no_report(tmp_path):
    assert QuantizationReport.load(tmp_path) is None
