"""A folder of built engines, which `bevqat build` writes and a robot loads without the ONNX graphs.

It has one built file for each part and a manifest.json, that of the parts with the section `engine`: which backend, which
version of it, the device that the files were built for, and the options. A built file is for only that version and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qat.core.errors import UserError
from qat.core.files import atomic_directory, read_json, sha256, write_json
from qat.engine import (
    CPU_BACKENDS,
    PRECISIONS,
    Engine,
    Options,
    TensorRtOptions,
    build,
    described,
    ending,
    find_backend,
    identify,
    load,
    takes_bfloat16,
)
from qat.families import flow_of
from qat.manifest import FILE, check_kind, load_manifest, pipeline_of
from qat.runtime.axes import check_profiles, limited, options_of_part

FORMAT_OF_PARTS = "engine"
AGAIN = "run `bevqat build` again, on the machine that will run it"
NOTED = ("backend", "version", "precision", "device", "device_fingerprint", "options")


def is_engines(folder: Path) -> bool:
    """Whether a folder's manifest describes built engines; False without a readable manifest."""
    try:
        manifest = read_json(folder / FILE)
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("format_of_parts") == FORMAT_OF_PARTS


def part_precisions(folder: Path, manifest: Mapping[str, Any], precision: str | None, backend: str) -> dict[str, str]:
    """The precision that each part of a folder is built for. Checks that the parts form a detector that `Pipeline` can run.

    All parts have one precision. In an int8 folder, parts that stay float are built as "int8" too; the backend then
    computes them in the float type that it uses with INT8. The result does not depend on whether `precision` is given.

    Args:
        precision: the requested one; None for the manifest's. An fp16 folder's graphs are FP32-typed, so "fp32" is right for
            it too.
        backend: a key of `qat.engine.BACKENDS`. CPU backends, mostly without FP16 arithmetic, get "fp32" for a
            `tensorrt-strong` folder in fp16, whose graphs fix their types.

    Raises:
        UserError: parts are missing, or are of another precision, batch or type of inputs and outputs.
    """
    found = manifest["precision"]
    if found not in PRECISIONS:
        raise UserError(
            f"{folder / FILE}: precision: found {found!r}, expected one of {', '.join(PRECISIONS)}; export again"
        )
    if precision is not None and precision != found and (found, precision) != ("fp16", "fp32"):
        raise UserError(f"{folder}: found {found} parts, expected {precision}; export again with --{precision}")
    needed = flow_of(pipeline_of(folder, manifest), source=str(folder)).plan.parts
    if missing := [name for name in needed if name not in manifest["parts"]]:
        raise UserError(f"{folder}: found no parts {', '.join(missing)}, expected all; export again without --parts")
    if manifest.get("batch", 1) not in (1, None):
        raise UserError(
            f"{folder}: found parts for batches of {manifest['batch']}, expected 1 or any; export again without "
            "--batch, or with --dynamic-batch"
        )
    if manifest.get("io", "fp32") != "fp32":
        raise UserError(f"{folder}: found FP16 inputs and outputs, expected FP32; export again without --io fp16")
    if precision is None:
        typed = found == "fp16" and manifest["flavour"] == "tensorrt-strong"
        precision = "fp32" if typed and backend in CPU_BACKENDS else found
    return dict.fromkeys(manifest["parts"], precision)


def check_tensors(part: Mapping[str, Any], engine: Engine, file: Path) -> None:
    """Raises `UserError` if a graph's inputs and outputs do not have the names and shapes in its manifest: the file was
    replaced together with its hash, or comes from another export.

    part: its entry in the manifest. file: the graph, for the message.
    """
    for kind, specs in (("inputs", engine.inputs), ("outputs", engine.outputs)):
        said = part.get(kind)
        if not isinstance(said, dict):
            continue
        for name, spec in specs.items():
            expected = said.get(name)
            if not isinstance(expected, dict) or not isinstance(expected.get("shape"), list):
                raise UserError(
                    f"{file}: found {kind[:-1]} {name}, expected {', '.join(said)} as in {FILE}; export again"
                )
            shape = expected["shape"]
            differs = len(shape) != len(spec.shape) or any(
                isinstance(a, int) and isinstance(b, int) and a != b and -1 not in (a, b)
                for a, b in zip(shape, spec.shape, strict=False)
            )
            if differs:
                raise UserError(
                    f"{file}: {name}: found shape {list(spec.shape)}, expected {shape} as in {FILE}; export again"
                )


def build_part(folder: Path, part: Mapping[str, Any], backend: str, precision: str, options: Options) -> Engine:
    """Builds one part of an exported folder for the sizes in its manifest; raises like `build` and `check_tensors`."""
    file = folder / part["file"]
    engine = build(file, backend, precision, options_of_part(part, options, folder / FILE))
    check_tensors(part, engine, file)
    return limited(engine, part, folder / FILE)


def _check_out(out: Path, folder: Path) -> None:
    if out.resolve() == folder.resolve():
        raise UserError(f"{out}: found the folder of the ONNX parts itself, expected another: it would be replaced")
    if out.exists() and not is_engines(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: found something other than built engines, expected a new folder: choose another")


def _run_notes(options: TensorRtOptions) -> dict[str, Any]:
    """Options that TensorRT needs again when a plan is loaded, because the plan lacks them."""
    plugins = [str(Path(plugin).resolve()) for plugin in options.plugins]
    return {"plugins": plugins, "cuda_graph": options.cuda_graph}


def build_engines(
    folder: str | Path,
    backend: str,
    precision: str | None = None,
    out: str | Path | None = None,
    options: Options | None = None,
    progress: Callable[[str], None] = lambda part: None,
) -> tuple[Path, dict[str, Any]]:
    """Builds every part of an exported folder into a folder of engines, whole or not at all.

    Args:
        folder: where export-camera wrote manifest.json and the parts.
        backend: a key of `qat.engine.BACKENDS`.
        precision: None for the manifest's.
        out: None for engines_PRECISION_BACKEND next to the folder. Earlier engines there are replaced.
        options: threads and the other options are stored, and are the defaults when the folder is loaded.
        progress: called with a part's name before it is built.

    Returns:
        the folder and its manifest.

    Raises:
        UserError: like `Pipeline.load` of the folder; bfloat16 is requested but does not apply; the backend cannot write
            what it built; or `out` exists and is something else.
    """
    folder = Path(folder)
    options = options or Options()
    manifest = load_manifest(folder)
    precisions = part_precisions(folder, manifest, precision, backend)
    if options.bfloat16 and not any(takes_bfloat16(backend, wanted) for wanted in precisions.values()):
        raise UserError(
            f"{folder}: bfloat16: found {manifest['precision']} parts for {backend}, expected int8 for openvino; omit it"
        )
    check_profiles(manifest, options, folder)
    out = Path(out) if out is not None else folder.parent / f"engines_{precision or manifest['precision']}_{backend}"
    version, suffix = find_backend(backend).version, ending(backend)
    device = identify(backend)
    _check_out(out, folder)
    parts = {}
    with atomic_directory(out) as temporary:
        for name, part in manifest["parts"].items():
            progress(name)
            file = temporary / f"{name}{suffix}"
            engine = build_part(folder, part, backend, precisions[name], options)
            engine.save(file)
            parts[name] = {
                **part,
                "file": file.name,
                "sha256": sha256(file),
                "bytes": file.stat().st_size,
                "built_for": precisions[name],
                "onnx": {"file": part["file"], "sha256": part["sha256"]},
            }
        verification = {key: value for key, value in manifest.get("verification", {}).items() if key != "file"}
        manifest = {
            **manifest,
            "format_of_parts": FORMAT_OF_PARTS,
            "verification": verification,  # belongs to the graphs; its frames stay with them
            "engine": {
                "backend": backend,
                "version": version,
                "precision": precision or manifest["precision"],
                "device": device.name,
                "device_fingerprint": device.fingerprint,
                "options": described(options, [backend], precisions.values()),
                **({"run": _run_notes(options.tensorrt)} if backend == "tensorrt" else {}),
            },
            "parts": parts,
        }
        write_json(temporary / FILE, manifest)
    return out, manifest


def engine_section(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the engines of a folder were built.

    Args:
        manifest: from `load_manifest`.

    Raises:
        UserError: it has no such section, or a damaged one.
    """
    path = folder / FILE
    noted = manifest.get("engine")
    if not isinstance(noted, dict) or not set(NOTED) <= set(noted):
        raise UserError(f"{path}: found no section engine with {', '.join(NOTED)}, expected it; {AGAIN}")
    for key in NOTED:
        check_kind(path, noted, key, dict if key == "options" else str, AGAIN, "engine")
    for where, key in (("options", "tensorrt"), ("", "run")):  # TensorRT only
        if key in (section := noted[where] if where else noted):
            check_kind(path, section, key, dict, AGAIN, "engine")
    for name, part in manifest["parts"].items():
        check_kind(path, part, "built_for", str, AGAIN, name)
        check_kind(path, check_kind(path, part, "onnx", dict, AGAIN, name), "sha256", str, AGAIN, f"{name}: onnx")
    return noted


def _changed(options: Any) -> dict[str, Any]:
    """The fields of options that differ from their defaults."""
    default = type(options)()
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def run_options(noted: Mapping[str, Any], asked: Options | None, source: Path) -> Options:
    """Options of built engines: those stored when they were built, except for fields of `asked` that differ from the
    default. bfloat16 and everything else in the files stay as built.

    Args:
        noted: `engine_section`.
        source: the manifest, for messages.

    Raises:
        UserError: bfloat16 is requested, but the engines were built without it; a library of plugins has moved.
    """
    plain = {field.name: type(field.default) for field in fields(Options) if isinstance(field.default, bool | int)}
    known: dict[str, Any] = {name: value for name, value in noted["options"].items() if type(value) is plain.get(name)}
    wanted = {} if asked is None else _changed(asked)
    meant = wanted.pop("bfloat16", False) and takes_bfloat16(noted["backend"], noted["precision"])
    if meant and not known.get("bfloat16"):
        raise UserError(f"{source}: found engines built without bfloat16, expected it; build with --bfloat16")
    run = noted.get("run", {})
    tensorrt = _changed(wanted.pop("tensorrt", TensorRtOptions()))
    tensorrt.setdefault("cuda_graph", run.get("cuda_graph") is not False)
    if "plugins" not in tensorrt and (plugins := run.get("plugins")):
        if gone := [name for name in plugins if not Path(name).is_file()]:
            raise UserError(
                f"{source}: built with plugins of {', '.join(gone)}, found no such file; give its current path: --plugins, "
                "or TensorRtOptions(plugins=…)"
            )
        tensorrt["plugins"] = tuple(map(Path, plugins))
    return Options(**{**known, **wanted}, tensorrt=TensorRtOptions(**tensorrt))


def load_engines(
    folder: str | Path, backend: str | None = None, precision: str | None = None, options: Options | None = None
) -> tuple[dict[str, Engine], dict[str, Any], Options]:
    """Loads a folder that `build_engines` wrote.

    Args:
        backend, precision: None for the manifest's; others are refused.
        options: fields that differ from the default replace the stored ones (`run_options`); None for all as
            noted.

    Returns:
        the engines by part, the manifest, the options they run with.

    Raises:
        UserError: the folder is incomplete or was changed; it was built for another backend, precision, version of the
            backend, processor or GPU; as `run_options`; or the backend does not load a file.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, format_of_parts=FORMAT_OF_PARTS)
    path = folder / FILE
    noted = engine_section(folder, manifest)
    if backend is not None and backend != noted["backend"]:
        raise UserError(
            f"{path}: found engines of {noted['backend']}, expected {backend}; build with --backend {backend}"
        )
    if precision is not None and precision != noted["precision"]:
        raise UserError(
            f"{path}: found engines in {noted['precision']}, expected {precision}; export it with --{precision} and build"
        )
    name = noted["backend"]
    version = find_backend(name).version
    lasting = noted["options"].get("tensorrt", {}).get("version_compatible", False)  # then TensorRT decides
    if version and version != noted["version"] and not lasting:
        raise UserError(f"{path}: built by {name} {noted['version']}, found {version} here; {AGAIN}")
    device = identify(name)
    if device.fingerprint != noted["device_fingerprint"]:
        other = device.name if device.name != noted["device"] else f"{device.name} with other instruction sets"
        raise UserError(f"{path}: built for {noted['device']}, found {other} here; {AGAIN}")
    options = run_options(noted, options, path)
    engines = {
        part: limited(load(folder / entry["file"], name, entry["built_for"], options), entry, path)
        for part, entry in manifest["parts"].items()
    }
    return engines, manifest, options
