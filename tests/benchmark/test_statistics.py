"""Percentiles, outliers, warm-up, and what counts as a change between two runs; all on made-up times."""

import copy
import json

import numpy as np
import pytest

from qat.benchmark.changes import compare_results, differences, load_results, print_changes
from qat.benchmark.run import FORMAT, SCHEMA
from qat.benchmark.statistics import ratio_interval, summary
from qat.benchmark.worker import WINDOW, until_stable
from qat.core.errors import UserError


def rounds(median, noise, count=20, repeats=3, drift=0.0, seed=0):
    """Times whose rounds share a factor e^(drift·normal)."""
    random = np.random.default_rng(seed)
    shared = np.exp(drift * random.standard_normal((count, 1)))
    return (median * shared * np.exp(noise * random.standard_normal((count, repeats)))).tolist()


def test_percentiles_are_numpys():
    values = list(range(1, 101))
    found = summary([values[:50], values[50:]])
    assert (found["median"], found["p90"], found["p99"]) == (50.5, 90.1, 99.01)
    assert (found["mean"], found["samples"]) == (50.5, 100)


def test_outliers_are_counted_and_kept():
    """Nine times about 10 ms and one of 100: median 10.05, MAD 0.25."""
    found = summary([[9.6, 9.8, 9.9, 10.0, 10.0], [10.1, 10.2, 10.3, 10.4, 100.0]])
    assert found["outliers"] == {"count": 1, "longest": [100.0]}
    assert found["samples"] == 10 and found["mean"] == pytest.approx(19.03)


def test_equal_times_have_no_outliers_of_a_thousandth():
    assert summary([[10.0] * 9 + [10.01]])["outliers"]["count"] == 0


def test_an_interval_covers_the_true_ratio_and_needs_more_than_noise():
    ratio, low, high = ratio_interval(rounds(10, 0.02), rounds(12, 0.02, seed=1))
    assert low < 1.2 < high and low < ratio < high and high - low < 0.1
    _, low, high = ratio_interval(rounds(10, 0.02), rounds(10, 0.02, seed=1))
    assert low < 1 < high


def test_rounds_are_what_is_drawn():
    """Sixty samples in twenty rounds that drift by 10 % tell no more than twenty do."""
    steady = ratio_interval(rounds(10, 0.1), rounds(10, 0.1, seed=1))
    drifting = ratio_interval(rounds(10, 0.001, drift=0.1), rounds(10, 0.001, drift=0.1, seed=1))
    alone = ratio_interval(rounds(10, 0.001, drift=0.1, repeats=1), rounds(10, 0.001, drift=0.1, repeats=1, seed=1))
    assert drifting[2] - drifting[1] > 1.3 * (steady[2] - steady[1])
    assert 0.5 < (drifting[2] - drifting[1]) / (alone[2] - alone[1]) < 2


def test_warm_up_ends_when_two_windows_agree():
    times = iter([50.0] * WINDOW + [20.0] * WINDOW + [10.0] * WINDOW + [10.2] * WINDOW + [1.0] * 100)
    assert until_stable(lambda: next(times)) == {
        "runs": 4 * WINDOW,
        "stable": True,
        "windows_ms": [50.0, 20.0, 10.0, 10.2],
    }


def test_warm_up_that_does_not_settle_is_told():
    times = iter(1.5**n for n in range(1000))
    found = until_stable(lambda: next(times), most_runs=17)
    assert found["runs"] == 15 and not found["stable"]


def results(medians, **more):
    rows = [
        {
            "name": name,
            "files": {"fuser": "a"},
            "sections": {
                section: {"latency_ms": summary(values), "rounds_ms": values} for section, values in sections.items()
            },
        }
        for name, sections in medians.items()
    ]
    machine = {"cpu": "one", "cores": 2, "threads": 2, "os": "x", "gpus": [], "versions": {"numpy": "1"}}
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "created": "then",
        "machine": machine,
        "measurement": {"inputs": "made up", "frames": 4},
        "rows": rows,
        **more,
    }


OLD = {
    "openvino int8": {"end to end": rounds(100, 0.02), "fuser": rounds(20, 0.02), "pattern": rounds(0.001, 0.5)},
    "openvino fp32": {"end to end": rounds(300, 0.02)},
}
NEW = {
    "openvino int8": {
        "end to end": rounds(101, 0.02, seed=1),
        "fuser": rounds(15, 0.02, seed=1),
        "pattern": rounds(0.004, 0.5),
    },
    "onnxruntime int8": {"end to end": rounds(80, 0.02)},
}


def test_only_what_is_beyond_noise_and_threshold_is_called_changed(capsys, tmp_path):
    changes = {(c.row, c.section): c for c in compare_results(results(OLD), results(NEW))}
    assert set(changes) == {("openvino int8", "end to end"), ("openvino int8", "fuser")}
    assert not changes["openvino int8", "end to end"].beyond
    fuser = changes["openvino int8", "fuser"]
    assert fuser.beyond and fuser.low < 0.75 < fuser.high
    assert not any(c.beyond for c in compare_results(results(OLD), results(NEW), threshold=0.4))
    print_changes(results(OLD), results(NEW), tmp_path / "old.json")
    printed = capsys.readouterr().out
    assert "1 of 2 sections changed by more than 3% beyond the noise" in printed
    assert "rows: openvino fp32 is not among the new ones" in printed
    assert "rows: onnxruntime int8 is not among the old ones" in printed


def test_another_machine_version_or_file_is_told():
    old, new = results(OLD), results(OLD)
    assert differences(old, new) == []
    new = copy.deepcopy(new)
    new["machine"] |= {"cpu": "two", "versions": {"numpy": "2"}, "gpus": [{"name": "H"}]}
    new["rows"][0]["files"] = {"fuser": "b"}
    new["measurement"]["inputs"] = "data:all"
    old["measurement"]["options"] = {"threads": 2, "spinning": True, "tensorrt": {"tf32": False, "workspace": None}}
    new["measurement"]["options"] = {"threads": 2, "spinning": False, "tensorrt": {"tf32": True, "workspace": None}}
    old["rows"][1]["options"] = {"threads": 2, "spinning": True}
    new["rows"][1]["options"] = {"threads": 1, "spinning": False, "bfloat16": True}
    assert differences(old, new) == [
        "machine: cpu: one then, two now",
        "machine: GPUs: none then, H now",
        "version: numpy 1 then, 2 now",
        "inputs: made up then, data:all now",
        "options: spinning: True then, False now",
        "options: tensorrt: tf32: False then, True now",
        "files: openvino int8: fuser changed",
        "options: openvino fp32: threads: 2 then, 1 now",
        "options: openvino fp32: bfloat16: None then, True now",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a result of benchmark, expected format 'bevqat-benchmark'"),
        (json.dumps({"format": FORMAT, "schema": 9}), "found schema 9, expected 1; run the benchmark again"),
        (json.dumps({"format": FORMAT, "schema": SCHEMA}), "damaged: KeyError('rows')"),
        (
            json.dumps(results({"a": {"end to end": [[1.0]]}}) | {"rows": [{"name": "a"}]}),
            "damaged: KeyError('sections')",
        ),
        (json.dumps(results({"a": {"end to end": [[1.0]]}})).replace("[[1.0]]", "[[]]"), "rounds without samples"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(UserError) as refused:
        load_results(tmp_path / "old.json")
    assert message in str(refused.value) and str(tmp_path) in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_results(tmp_path / "none.json")


def test_a_threshold_is_a_share():
    with pytest.raises(UserError, match="--threshold: found -1"):
        compare_results(results(OLD), results(NEW), threshold=-1)
