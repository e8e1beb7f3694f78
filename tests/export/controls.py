"""What the tests of verification's controls share: an export's sites, and what tells of damage to them."""

import numpy as np

from qat.core.onnx_cut import Cut
from qat.core.sites import Runner, check_sites, grid_problems, tile
from qat.core.verification import Summary
from qat.families import flow_of
from qat.manifest import load_manifest

FLAVOURS = ("tensorrt", "tensorrt-strong", "onnxruntime", "openvino")


def int8_parts(folder):
    """(name, part, bytes, reference of its sites, inputs) of each part with sites."""
    manifest = load_manifest(folder)
    summary = Summary(folder, manifest, flow_of(manifest["pipeline"]))
    for name, part in manifest["parts"].items():
        if "sites" in part:
            yield (
                name,
                part,
                (folder / part["file"]).read_bytes(),
                summary.sites(name),
                summary.inputs(name, part["sites"]["frame"]),
            )


def codes_at(data, sites, feeds, wanted):
    """Everything that these sites give on the stored codes."""
    codes = {name: tile(site.patch, site.shape) for name, site in sites.items() if site.patch is not None}
    runner = Runner(Cut(data), {})
    return {name: value for name, value in runner.run({**feeds, **codes}) if name in wanted}


def undetected(data, damaged, done, sites, feeds, pairs):
    """Those of the damaged sites that nothing tells of, and by how much their values change on the stored codes."""
    cut = Cut(damaged)
    found = check_sites(cut, sites, feeds)
    named = grid_problems(cut, pairs)
    modules = {entry["tensor"]: entry["module"] for entry in pairs}
    missed = [s for s in done if found[s]["passed"] and not any(p.startswith(f"{modules.get(s)}: ") for p in named)]
    if not missed:
        return {}
    before, after = (codes_at(one, sites, feeds, missed) for one in (data, damaged))
    return {site: float(np.abs(before[site].astype(float) - after[site].astype(float)).max()) for site in missed}
