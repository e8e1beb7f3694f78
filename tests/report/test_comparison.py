"""Two runs side by side: which is better, and what must not be compared."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from qat.cli import main
from qat.report import compare_runs, write_comparison
from qat.report.comparison import run_names
from tests.messages import says


def _change(results: dict, **by: float) -> dict:
    """A later run, whose shipped row (OpenVINO INT8) differs by this much; speed is a factor."""
    other = copy.deepcopy(results)
    row = other["rows"][3]
    row["map"] += by.get("map", 0.0)
    row["nds"] += by.get("nds", 0.0)
    row["latency_ms"]["median"] /= by.get("speed", 1.0)
    return other


@pytest.mark.parametrize(
    ("by", "better", "headline"),
    [
        ({}, None, "There is no difference"),
        ({"map": 0.001, "speed": 1.03}, None, "There is no difference"),
        ({"map": 0.004}, "B", "B is better"),
        ({"map": 0.004, "nds": -0.003}, None, "Neither is clearly better"),
        ({"map": -0.004, "nds": -0.003}, "A", "A is better"),
        ({"speed": 1.2}, "B", "B is better"),
        ({"speed": 0.8}, "A", "A is better"),
        ({"map": 0.004, "speed": 1.2}, "B", "B is better"),
        ({"map": -0.01, "nds": -0.01, "speed": 1.2}, "B", "B is better"),  # a loss that a verdict accepts for speed
        ({"map": 0.01, "nds": 0.01, "speed": 0.8}, "A", "A is better"),
    ],
)
def test_the_better_run_gains_and_gives_up_no_more_than_a_verdict_accepts(
    results: dict, by: dict, better: str | None, headline: str
) -> None:
    del results["rows"][3]["change"]
    found = compare_runs(results, _change(results, **by))
    assert (found.better, found.headline, found.warnings) == (better, headline, [])


def test_what_the_keyframes_do_not_tell_apart_is_no_difference(results: dict) -> None:
    # The shipped row's intervals against FP32 are 0.011 mAP and 0.0083 NDS wide.
    found = compare_runs(results, _change(results, map=-0.005, nds=-0.004))
    assert (found.better, found.headline) == (None, "There is no difference")
    assert found.reasons[0] == (
        "From A to B: mAP −0.005 and NDS −0.004; these keyframes cannot show differences below 0.0055 mAP and 0.0042 NDS."
    )
    assert compare_runs(results, _change(results, map=-0.006, nds=-0.004)).better == "A"


def test_the_order_of_the_runs_does_not_matter(results: dict) -> None:
    other = _change(results, map=-0.01, nds=-0.01, speed=1.2)
    assert compare_runs(results, other).better == "B" and compare_runs(other, results).better == "A"


def test_a_run_without_an_engine_to_ship_is_the_worse(results: dict) -> None:
    other = copy.deepcopy(results)
    for row in other["rows"][2:]:
        row["map"] = 0.1
    found = compare_runs(results, other)
    assert (found.better, found.reasons) == ("A", ["B has no engine to ship."])
    assert compare_runs(other, other).headline == "Neither run has an engine to ship"


def test_latencies_of_two_machines_are_not_compared(results: dict) -> None:
    other = _change(results, speed=3.0)
    other["machine"]["cpu"] = "Faster CPU"
    found = compare_runs(results, other)
    assert found.better is None
    assert found.warnings == [
        "The machines differ (cpu Example CPU @ 2.50GHz and Faster CPU): latencies of the two runs cannot be compared."
    ]
    assert not any("fast" in reason for reason in found.reasons)


@pytest.mark.parametrize("key", ["name", "version", "split", "samples"])
def test_accuracies_on_other_data_are_not_compared(results: dict, key: str) -> None:
    other = _change(results, map=0.1)
    other["dataset"][key] = 39 if key == "samples" else "another"
    found = compare_runs(results, other)
    assert found.better is None
    assert f"The data differ ({key} " in found.warnings[0]
    assert not any("mAP" in reason for reason in found.reasons)
    other["machine"]["cores"] = 64
    assert compare_runs(results, other).headline == "The runs cannot be compared"


def test_changed_tables_of_one_data_set_are_told(results: dict) -> None:
    other = copy.deepcopy(results)
    for run, digest in ((results, "aa"), (other, "bb")):
        run["provenance"]["files"].append({"what": "dataset tables, all together", "file": "t", "sha256": digest * 32})
    assert "tables were changed" in compare_runs(results, other).warnings[0]


def _cells(html: str, table: int) -> list[list[str]]:
    body = html.split("<table")[table + 1].split("<tbody>")[1].split("</tbody>")[0]
    return [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row)]
        for row in re.findall(r"<tr.*?</tr>", body)
    ]


def test_rows_are_matched_by_backend_precision_and_flavour(results: dict, tmp_path: Path) -> None:
    other = _change(results, map=-0.007, nds=0.001, speed=1.1)
    other["rows"].pop(5)
    other["rows"].append({**copy.deepcopy(results["rows"][5]), "flavour": "onnxruntime"})
    write_comparison(results, other, tmp_path / "c.html")
    rows = _cells((tmp_path / "c.html").read_text(), 0)
    assert len(rows) == 7
    assert rows[3] == [
        "OpenVINO INT8", "0.512", "0.505", "−0.007", "0.548", "0.549", "+0.001", "33.0 ms", "30.0 ms", "−3.00 ms", "1.10×",
    ]  # fmt: skip
    assert rows[5][1:4] == ["0.513", "–", "–"] and rows[6][1:4] == ["–", "0.513", "–"]
    assert rows[5][0] != rows[6][0]  # the flavour tells them apart


def test_the_page_shows_classes_units_and_what_differs(results: dict, tmp_path: Path) -> None:
    other = copy.deepcopy(results)
    other["rows"][3]["per_class_ap"]["car"] = 0.9
    other["sensitivity"]["units"][0]["sqnr_db"]["objects"] = 35.5
    other["sensitivity"]["floats"].pop()
    other["provenance"]["versions"]["openvino"] = "2027.0.0"
    other["provenance"]["calibration"]["method"] = "max"
    other["provenance"]["files"][0]["sha256"] = "ef" * 32
    other["provenance"]["commands"][0]["command"] = "bevqat calibrate --method max"
    write_comparison(results, other, tmp_path / "c.html", ("before", "after"))
    html = (tmp_path / "c.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<wbr>", "", html))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    for expected in (
        "A: before", "B: after", "car 0.778 → 0.900 +0.122", "decoder: input 31.0 35.5 +4.5", "versions openvino 2026.4.1 2027.0.0",
        "calibration method entropy max", "sha256: float checkpoint model.pth abababababababab efefefefefefefef",
        "command: ptq.pth bevqat calibrate --out runs/demo/ptq.pth bevqat calibrate --method max",
    ):  # fmt: skip
        assert expected in text, expected
    assert "versions torch" not in text  # the same in both
    assert text.index("There is no difference") < text.index("Accuracy and latency")


def test_the_command_writes_comparison_html_beside_the_first(results: dict, tmp_path: Path, capsys) -> None:
    paths = [tmp_path / name / "results.json" for name in ("monday", "tuesday")]
    for path, run in zip(paths, (results, _change(results, speed=1.5)), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps(run))
    assert main(["report", *map(str, paths)]) == 0
    page = tmp_path / "monday" / "comparison.html"
    assert "<title>monday and tuesday: B is better</title>" in page.read_text()
    out = capsys.readouterr().out
    assert (
        "B is better. Their accuracy is the same to within 0.002. B is 1.50× as fast: 33.0 ms in A, 22.0 ms in B."
        in out
    )
    assert sorted(path.name for path in page.parent.iterdir()) == ["comparison.html", "results.json"]


def test_more_than_two_or_a_damaged_second_run_is_refused_in_one_line(results: dict, tmp_path: Path, capsys) -> None:
    good, bad = tmp_path / "a.json", tmp_path / "b.json"
    good.write_text(json.dumps(results))
    bad.write_text(json.dumps({**results, "rows": []}))
    assert main(["report", *[str(good)] * 3]) == 2
    assert says(capsys.readouterr().err, "error: report: found 3 results", "expected one, or two")
    assert main(["report", str(good), str(bad)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {bad}: rows: found []")
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ("runs/x/results.json", "runs/y/results.json", ("x", "y")),
        ("runs/x/old.json", "runs/x/new.json", ("old", "new")),
        ("runs/x/out/results.json", "runs/y/out/results.json", ("x/out/results.json", "y/out/results.json")),
    ],
)
def test_runs_are_called_by_what_tells_their_paths_apart(a: str, b: str, names: tuple[str, str]) -> None:
    assert run_names(a, b) == names


def test_one_file_given_twice_has_names_too(tmp_path: Path) -> None:
    assert run_names(tmp_path / "results.json", tmp_path / "results.json") == ("results.json", "results.json")
