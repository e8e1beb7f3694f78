"""The page that a reader gets, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qat.cli import main
from qat.core.errors import UserError
from qat.report import check_results, write_comparison, write_report
from qat.report.sensitivity import unit_name

VOID = {"meta", "input", "br", "wbr", "image", "path", "rect", "circle"}


class Page(HTMLParser):
    """Collects the text and every address; fails on a tag that is not closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.scripts += tag == "script"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID or tag == "path":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def _page(results: dict, folder: Path) -> Page:
    write_report(results, folder / "report.html")
    return Page((folder / "report.html").read_text("utf-8"))


def test_the_page_opens_with_what_to_ship_and_what_it_costs(results: dict, tmp_path: Path) -> None:
    text = _page(results, tmp_path).text
    assert text.index("Ship OpenVINO INT8") < text.index("Accuracy and latency")
    assert "2.15× as fast as OpenVINO FP32" in text
    assert "Against PyTorch FP32: no difference found, at most 0.009 mAP and 0.007 NDS lost." in text
    assert "PyTorch INT8 simulated: it costs 0.004 mAP and 0.003 NDS; that is within the 0.02 accepted." in text


def test_the_table_holds_every_row_beside_fp32(results: dict, tmp_path: Path) -> None:
    write_report(results, tmp_path / "report.html")
    table = (tmp_path / "report.html").read_text().split("<table")[1].split("</table")[0]
    body = re.findall(r"<tr class=\"(\w*)\">(.*?)</tr>", table)
    cells = [re.sub(r"<[^>]+>", "|", line) for _, line in body]
    assert [style for style, _ in body] == ["", "", "", "ship", "", ""]
    assert re.sub(r"\|+", "|", cells[1]) == "|PyTorch INT8 simulated|0.513|−0.004|0.549|−0.003|–|–|–|18.9 MB|23.0 dB|"
    assert re.sub(r"\|+", "|", cells[3]) == (
        "|OpenVINO INT8|0.512|−0.005|−0.009 … +0.002|0.548|−0.004|−0.007 … +0.001|33.0 ms|40.9 ms|2.15×|18.9 MB|22.0 dB|"
    )


def test_the_page_shows_classes_stages_machine_measurement_and_provenance(results: dict, tmp_path: Path) -> None:
    text = _page(results, tmp_path).text
    for expected in (
        "construction vehicle", "0.780", "camera.backbone", "mATE, m", "10 rounds", "1000 paired resamples of the 8 scenes", "12.3 ms when the geometry changes",
        "Example CPU @ 2.50GHz", "avx512_vnni", "openvino 2026.4.1", "method entropy", "abababababababab",
        "bevqat compare --ckpt", "1 box only in PyTorch FP32", "front left", "car 320",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_page_loads_nothing_from_outside(results: dict, tmp_path: Path) -> None:
    page = _page(results, tmp_path)
    assert len(page.addresses) == 6
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "@import" not in (tmp_path / "report.html").read_text()


def test_every_text_of_the_results_is_escaped(results: dict, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"'&"
    results["model"] = results["dataset"]["name"] = results["machine"]["cpu"] = results["provenance"]["command"] = (
        attack
    )
    results["provenance"]["versions"] = {attack: attack}
    results["provenance"]["files"] = [{"what": attack, "file": attack, "sha256": attack}]
    results["dataset"]["objects"] = {attack: 3}
    frame = results["frames"][0]
    frame["token"] = frame["cameras"][0]["name"] = attack
    for kind in frame["boxes"].values():
        kind[0]["label"] = attack
        kind[0]["outlines"] = {attack: [[0, 0, 5, 5]]}
    for row in results["rows"]:
        row["flavour"] = row["backend"] + attack
        row["per_class_ap"] = {attack: 0.5}
        row["stages_ms"] = {attack: 1.0}
        row["sqnr_db"] = {attack: 1.0}
    results["rows"][5]["backend"] = attack
    section = results["sensitivity"]
    section["dataset"] = dict.fromkeys(section["dataset"], attack)
    for unit in (*section["units"], section["together"]):
        unit["name"] = attack
        unit["layers"] = [attack]
        unit["sqnr_db"] = {attack: 20.0}
        unit["drop"] = {attack: 0.1}
    section["reference"] = {attack: 0.5}
    section["floats"] = [
        dict.fromkeys(("part", "rule", "reason"), attack) | {"layers": [attack] * 5, "macs_share": 0.1}
    ]
    for histogram in section["histograms"]:
        histogram |= {"unit": attack, "method": attack, "layers": [attack]}
    results["provenance"]["commands"] = [{"what": attack, "command": attack, "versions": {attack: attack}}]
    results["provenance"]["calibration"] = {attack: [[attack, attack]]}
    page = _page(results, tmp_path)
    assert page.scripts == 1
    assert "alert(1)" in page.text
    other = copy.deepcopy(results)
    other["dataset"]["name"] += "2"
    other["machine"]["cpu"] += "2"
    other["rows"].pop()
    write_comparison(results, other, tmp_path / "both.html", (attack, attack))
    page = Page((tmp_path / "both.html").read_text("utf-8"))
    assert page.scripts == 1
    assert page.text.count("alert(1)") > 20


def test_a_minimal_document_of_the_issue_makes_a_page(results: dict, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("backend", "precision", "flavour", "map", "nds", "per_class_ap", "latency_ms",
                                       "speedup_vs_fp32", "size_mb", "sqnr_db")} for row in results["rows"]]  # fmt: skip
    minimal = {"schema": 1, "model": "m", "dataset": {"samples": 4}, "machine": {}, "rows": rows}
    assert "Ship OpenVINO INT8" in _page(minimal, tmp_path).text
    for row in rows[:2]:
        assert "Nothing to ship yet" in _page({**minimal, "rows": [row]}, tmp_path).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=2), "schema: found 2, expected 1"),
        (lambda r: r.update(rows=[]), r"rows: found \[\], expected 1 or more"),
        (lambda r: r["rows"][1].pop("map"), r"rows\[1\]\.map: missing"),
        (lambda r: r["rows"][1].update(nds=1.5), r"rows\[1\]\.nds: found 1.5, expected a number from 0 to 1"),
        (lambda r: r["rows"][2]["latency_ms"].update(median=float("nan")), r"rows\[2\]\.latency_ms\.median: found nan"),
        (lambda r: r["rows"][2]["latency_ms"].update(median=0), "expected more than 0"),
        (lambda r: r["frames"][0]["cameras"][0].update(jpeg='"><script>'), r"frames\[0\]\.cameras\[0\]\.jpeg"),
        (lambda r: r["frames"][0].update(candidate=6), r"frames\[0\]\.candidate: found 6"),
        (lambda r: r["sensitivity"].update(units=[]), r"sensitivity\.units: found \[\], expected 1 or more"),
        (
            lambda r: r["sensitivity"]["units"][1].update(macs_share=2),
            r"sensitivity\.units\[1\]\.macs_share: found 2, expected a number from 0 to 1",
        ),
        (lambda r: r["sensitivity"]["together"].update(sqnr_db={}), r"sensitivity\.together\.sqnr_db: found \{\}"),
        (lambda r: r["sensitivity"]["histograms"][0].update(amax=0), r"histograms\[0\]\.amax: found 0, expected more"),
        (lambda r: r["sensitivity"]["histograms"][1].update(counts=[1, -1]), r"histograms\[1\]\.counts\[1\]: found -1"),
        (lambda r: r["sensitivity"]["histograms"][1].update(counts=[0] * 600), "expected at most 512"),
        (lambda r: r["sensitivity"]["floats"][0].pop("reason"), r"sensitivity\.floats\[0\]\.reason: missing"),
        (
            lambda r: r["provenance"].update(commands=["ls"]),
            r"provenance\.commands\[0\]: found 'ls', expected a section",
        ),
        (
            lambda r: r["frames"][0]["boxes"]["truth"][0].update(corners=[[1, "2"]]),
            r"found '2', expected a finite number",
        ),
        # Numbers are written into the page as they are, so none of these may be a text.
        (lambda r: r["dataset"]["objects"].update(car="<script>"), r"dataset\.objects\.car: found '<script>'"),
        (lambda r: r["dataset"].update(objects=[1]), r"dataset\.objects: found \[1\], expected a section"),
        (lambda r: r["measurement"].update(pattern_rebuild_ms="1"), r"measurement\.pattern_rebuild_ms: found '1'"),
        (lambda r: r["provenance"].update(files=3), r"provenance\.files: found 3, expected a list"),
        (lambda r: r["rows"][0].update(flavour=[]), r"rows\[0\]\.flavour: found \[\], expected text"),
        (lambda r: r["rows"][0]["latency_ms"].update(median=10**400), r"latency_ms\.median: found 1000"),
        (lambda r: r["frames"][0].update(range=1e12), r"frames\[0\]\.range: found 1000000000000\.0, expected a number"),
        (lambda r: r["frames"][0]["boxes"]["truth"][0].update(score="1"), r"truth\[0\]\.score: found '1'"),
    ],
)
def test_impossible_results_are_refused_by_path(results: dict, change, message: str) -> None:
    change(results)
    with pytest.raises(UserError, match=message):
        check_results(results)


def test_refused_results_leave_the_earlier_page_whole(results: dict, tmp_path: Path, capsys) -> None:
    page, source = tmp_path / "report.html", tmp_path / "results.json"
    page.write_text("earlier")
    source.write_text(json.dumps({**results, "schema": 9}))
    assert main(["report", str(source)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source}: schema: found 9")
    assert page.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_the_command_writes_the_page_beside_the_results(results: dict, tmp_path: Path, capsys) -> None:
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    assert main(["report", str(source)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "Ship OpenVINO INT8" in capsys.readouterr().out


def test_units_that_pay_are_drawn_by_the_noise_that_they_make(results: dict, tmp_path: Path) -> None:
    write_report(results, tmp_path / "report.html")
    chart = (tmp_path / "report.html").read_text().split('<div class="units">')[1].split("</details>")[0]
    widths = [float(width) for width in re.findall(r'class="fill" style="width:([\d.]+)%"', chart)]
    noise = [10 ** (-value / 10) for value in (27.5, 31.0, 34.0, 41.0)]
    assert widths == pytest.approx([100 * value / noise[0] for value in noise], abs=0.01)
    assert '31.0 dB <small class="drop">−0.0042 mAP' in chart and "+0.0010" in chart


def test_the_page_tells_what_stays_float_and_why(results: dict, tmp_path: Path) -> None:
    text = _page(results, tmp_path).text
    for expected in (
        "Each of the 43 quantized units", "over 4 keyframes of example-data, split calib", "INT8 91.6 %", "float 8.4 %",
        "vtransform downsample. 0, downsample. 3 8.4 % built in FP16, without QDQ",
        "INT8 costs more map than the budget of 0.001 allows",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_histogram_shows_the_range_beside_the_values(results: dict, tmp_path: Path) -> None:
    write_report(results, tmp_path / "report.html")
    first, second = re.findall(r'<figure class="card histogram">(.*?)</figure>', (tmp_path / "report.html").read_text())
    assert "amax 40" in first and "Range by mse; 0.031 % clipped; 12.3 % rounded to zero; 41.0 % zero anyway." in first
    assert 'class="beyond"' in first and 'class="beyond"' not in second  # nothing is clipped in the second
    line = float(re.search(r'<path class="amax" d="M([\d.]+) ', first).group(1))
    outline = re.search(r'class="area" d="M([\d.]+) [\d.]+(.*?)Z"', first)
    left, ends = float(outline.group(1)), [float(x) for x in re.findall(r"H([\d.]+)", outline.group(2))]
    assert len(ends) == 60
    assert (line - left) / (ends[-1] - left) == pytest.approx(40 / 60, abs=0.002)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("camera.quant_encoders_camera_backbone_act1", "camera: backbone_act1"),
        ("decoder.quant_decoder_neck_fuse_2", "decoder: neck_fuse_2"),
        ("decoder.quant_x", "decoder: input"),
        ("head.quant_heads_object_shared_conv_activate", "head: shared_conv_activate"),
        ("odd", "odd"),
    ],
)
def test_units_are_called_by_their_tensor(name: str, shown: str) -> None:
    assert unit_name(name) == shown


def test_every_artifacts_command_is_told_once(results: dict, tmp_path: Path) -> None:
    results["provenance"]["commands"][1]["command"] = results["provenance"]["commands"][2]["command"]
    text = _page(results, tmp_path).text
    assert "ptq.pth with torch 2.12.0 bevqat calibrate --out runs/demo/ptq.pth" in text
    assert "onnx_fp32, these results bevqat compare" in text
    assert text.count("bevqat compare --ckpt") == 1


def test_results_of_before_the_commands_and_the_sensitivity_still_make_a_page(results: dict, tmp_path: Path) -> None:
    del results["provenance"]["commands"], results["sensitivity"]
    text = _page(results, tmp_path).text
    assert "these results bevqat compare --ckpt" in text
    assert "Accuracy loss by layer" not in text and "None" not in text


def test_without_jinja2_and_pydantic_benchmarks_are_drawn() -> None:
    """`bevqat benchmark` runs on GPU machines that have no more than numpy; the import must not ask for templates."""
    code = "import sys; sys.modules['jinja2'] = sys.modules['pydantic'] = None; import qat.benchmark.plot; from qat.report import check_results, decide"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
