"""What an exported folder's parts are built for, as each release of TensorRT then takes them."""

from pathlib import Path

import pytest

from qat.core.errors import UserError
from qat.core.onnx_file import read_outline
from qat.engine import TensorRtOptions
from qat.engine.tensorrt_builder import Typing, choose_typing
from qat.engine.tensorrt_capabilities import Capabilities
from qat.manifest import load_manifest
from qat.runtime.engines import part_precisions

FLOAT = "camera.vtransform"  # stays float in an INT8 export
PARTS = ("camera.backbone", FLOAT, "fuser", "head.bbox")


@pytest.fixture
def typings(forms, graphs, stand_in):
    """(form of the quantized parts, form of the vtransform, version, precision) → the typing of each."""

    def choose(form: str, float_form: str, version: str, precision: str | None = None) -> tuple[Typing, Typing]:
        folder = forms[form]
        manifest = load_manifest(folder)
        entry, left = manifest["parts"]["fuser"], load_manifest(forms[float_form])["parts"]["fuser"]
        manifest["parts"] = {name: left if name == FLOAT else entry for name in PARTS}
        found = part_precisions(folder, manifest, precision, "tensorrt")

        def typing(path: Path, wanted: str) -> Typing:
            return choose_typing(path, read_outline(path), wanted, TensorRtOptions(), Capabilities(stand_in(version)))

        return typing(graphs[form], found["fuser"]), typing(graphs[float_form], found[FLOAT])

    return choose


@pytest.mark.parametrize("version", ["10.0.1", "11.4.0.106"])
@pytest.mark.parametrize("precision", [None, "named"])
def test_strongly_typed_folders_are_built_as_their_graphs_say(typings, version, precision):
    strong = Typing(True, ())
    assert typings("int8-strong", "fp16-strong", version, precision and "int8") == (strong, strong)
    assert typings("fp16-strong", "fp16-strong", version, precision and "fp16") == (strong, strong)


@pytest.mark.parametrize("version", ["8.5.3.1", "8.6.1", "10.0.1"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_the_float_part_of_an_int8_folder_takes_fp16_named_or_not(typings, version, precision):
    assert typings("int8", "fp32", version, precision) == (Typing(False, ("INT8", "FP16")), Typing(False, ("FP16",)))


def test_an_fp32_folder_stays_fp32(typings):
    assert typings("fp32", "fp32", "8.6.1") == (Typing(False, ()), Typing(False, ()))


def test_cpus_are_told_fp32_of_graphs_that_say_fp16_themselves(forms):
    manifest = load_manifest(forms["fp16-strong"])
    manifest["parts"] = dict.fromkeys(PARTS, manifest["parts"]["fuser"])
    for backend, expected in (
        ("openvino", "fp32"),
        ("onnxruntime", "fp32"),
        ("openvino-npu", "fp16"),
        ("tensorrt", "fp16"),
    ):
        assert set(part_precisions(forms["fp16-strong"], manifest, None, backend).values()) == {expected}
    with pytest.raises(UserError, match="found fp16 parts, expected int8"):
        part_precisions(forms["fp16-strong"], manifest, "int8", "tensorrt")
