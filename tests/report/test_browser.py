"""The pages in a real browser: with and without JavaScript, on a phone, in the dark, printed."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from qat.report import write_comparison, write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
DARK = "--blink-settings=preferredColorScheme=0"
HERE = Path(__file__).parent
# Pictures of the pages are kept in this folder, for people to look at.
KEPT = os.environ.get("BEVQAT_SCREENSHOTS")


def _run(folder: Path, *flags: str) -> str:
    usual = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *usual, *flags], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture
def pages(results: dict, tmp_path: Path) -> dict[str, Path]:
    """report and comparison, of results with names as long as real ones are."""
    other = copy.deepcopy(results)
    other["machine"]["cpu"] = "Another CPU with a long name @ 3.70GHz"
    other["provenance"]["versions"]["openvino"] = "2027.0.0"
    other["rows"][3]["map"] += 0.03
    for run in (results, other):
        run["sensitivity"]["units"][0]["name"] = "head.quant_heads_object_task_heads_0_heatmap_0_activate"
        run["provenance"]["files"][0]["file"] = "a-rather-long-name-of-a-checkpoint-2026-11-22-final.pth"
    found = {"report": tmp_path / "report.html", "comparison": tmp_path / "comparison.html"}
    write_report(results, found["report"])
    write_comparison(results, other, found["comparison"], ("before", "after"))
    return found


def _looked_at(pages: dict[str, Path], folder: Path, *flags: str) -> dict[str, dict]:
    """What `browser.js` finds in the pages, by page, width and whether scripts run."""
    texts = json.dumps({name: path.read_text("utf-8") for name, path in pages.items()}).replace("</", "<\\/")
    script = (HERE / "browser.js").read_text("utf-8")
    harness = folder / "harness.html"
    harness.write_text(
        f'<!doctype html><meta charset="utf-8"><body><script>const pages = {texts};\n{script}</script>',
        encoding="utf-8",
    )
    dom = _run(folder, *flags, "--dump-dom", harness.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.S)
    assert found is not None, dom[-2000:]
    return dict(json.loads(html.unescape(found.group(1))))


def test_pages_read_the_same_with_and_without_scripts_and_fit_a_phone(pages: dict[str, Path], tmp_path: Path) -> None:
    found = _looked_at(pages, tmp_path)
    assert len(found) == 8
    for name, page in found.items():
        assert page["overflowing"] == [], name
        assert page["unreadable"] == [], name
        if not name.endswith("no scripts"):
            assert page["unsorted"] == [], name
            assert page["text"] == found[f"{name} no scripts"]["text"], name
    assert found["report 360"]["tables"] == 8 and found["comparison 360"]["tables"] == 5
    text = re.sub(r"\s+", " ", found["report 360 no scripts"]["text"])
    for expected in (
        "Ship OpenVINO INT8", "2.15× as fast", "Latency of a frame", "Accuracy over latency", "construction vehicle",
        "all 43 together 27.5 dB", "Kept in float", "built in FP16, without QDQ", "amax 40", "0.031 % clipped",
        "Keyframe 1", "bevqat calibrate --out runs/demo/ptq.pth", "Example CPU @ 2.50GHz", "abababababababab",
    ):  # fmt: skip
        assert expected in text, expected
    text = re.sub(r"\s+", " ", found["comparison 360 no scripts"]["text"])
    for expected in ("B is better", "The machines differ", "latencies of the two runs cannot be compared", "openvino"):
        assert expected in text, expected


def test_pages_are_readable_in_the_dark(pages: dict[str, Path], tmp_path: Path) -> None:
    for name, page in _looked_at(pages, tmp_path, DARK).items():
        assert page["background"] == "rgb(16, 22, 29)", name
        assert page["unreadable"] == [], name


def _photograph(page: Path, width: int, height: int, out: Path, *flags: str) -> Image.Image:
    """A screenshot of so much of a page; a frame gives it the width of a phone, which a window cannot have."""
    frame = out.with_suffix(".frame.html")
    style = f"width:{width}px;height:{height}px;border:0"
    frame.write_text(f'<!doctype html><body style="margin:0"><iframe style="{style}" src="{page.name}"></iframe>')
    _run(out.parent, *flags, f"--window-size={width},{height}", f"--screenshot={out}", frame.as_uri())
    if KEPT:
        Path(KEPT).mkdir(parents=True, exist_ok=True)
        shutil.copy(out, KEPT)
    return Image.open(out).convert("RGB")


@pytest.mark.parametrize(
    ("name", "width", "height", "flags", "page"),
    [
        ("desktop", 1200, 5200, [], (246, 247, 249)),
        ("phone", 360, 9000, [], (246, 247, 249)),
        ("dark", 1200, 5200, [DARK], (16, 22, 29)),
    ],
)
def test_a_screenshot_shows_the_page_in_its_colours(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, height: int, flags: list[str], page: tuple[int, ...]
) -> None:
    picture = _photograph(pages["report"], width, height, tmp_path / f"{name}.png", *flags)
    assert picture.size == (width, height)
    assert picture.getpixel((2, 2)) == page
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    int8 = (255, 160, 70) if flags else (224, 123, 22)
    assert int8 in colours and len(colours) > 200


def test_printed_pages_are_few_and_hold_what_is_folded_on_a_screen(pages: dict[str, Path], tmp_path: Path) -> None:
    counts = {}
    for name, page in pages.items():
        out = tmp_path / f"{name}.pdf"
        _run(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={out}", page.as_uri())
        counts[name] = len(re.findall(rb"/Type /Page\b", out.read_bytes()))
        if KEPT:
            shutil.copy(out, KEPT)
    assert 4 <= counts["report"] <= 9 and 1 <= counts["comparison"] <= 4, counts
    folded = tmp_path / "unfolded.html"
    folded.write_text(pages["report"].read_text("utf-8").replace("<details>", "<details open>"), encoding="utf-8")
    _run(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'unfolded.pdf'}", folded.as_uri())
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "unfolded.pdf").read_bytes())) == counts["report"]
