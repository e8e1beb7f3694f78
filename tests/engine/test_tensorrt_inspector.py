"""The engine inspector's output of each generation of TensorRT, in made-up layers of its form, becomes one table."""

import json

import pytest

from qat.core.errors import UserError
from qat.engine.inspector import find, read_io, read_layers, table, with_times

WIDE = "Thirty-two wide channel vectorized row major Int8 format"


def tensor8(name: str, form: str) -> dict:
    return {"Name": name, "Location": "Device", "Dimensions": [1, 8, 4, 4], "Format/Datatype": form}


def conv8(name: str, stored: str, source: str, target: str, tactic: str = "") -> dict:
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor8("a", source)],
        "Outputs": [tensor8("b", target)],
        "ParameterType": "Convolution",
        "Weights": {"Type": stored, "Count": 64},
        "TacticName": tactic,
    }


TRT8 = {
    "Layers": [
        {
            "Name": "/quant/QuantizeLinear",
            "LayerType": "Reformat",
            "Inputs": [tensor8("img", "Row major linear FP32")],
            "Outputs": [tensor8("q", WIDE)],
            "Origin": "QDQ",
        },
        conv8(
            "w1 + /w1/QuantizeLinear + /one/Conv + PWN(/one/Relu, /one/Mul)", "Int8", WIDE, WIDE, "sm80_xmma_i8i8_i8i32"
        ),
        conv8(
            "/two/Conv + /two/Add",
            "Half",
            "Two wide channel vectorized row major FP16 format",
            "Row major linear FP16 format",
        ),
        conv8(
            "/three/Conv", "Float", "Row major linear FP32", "Row major linear FP32", "sm80_xmma_fprop_tf32f32_tf32f32"
        ),
        conv8(
            "/four/Conv",
            "Float",
            "Channel major FP32 format where channel % 4 == 0",
            "Row major linear FP32",
            "sm50_scudnn",
        ),
        {
            "Name": "Reformatting CopyNode for Output Tensor 0 to /four/Conv",
            "LayerType": "NoOp",
            "Inputs": [tensor8("b", "Row major linear FP32")],
            "Outputs": [tensor8("y", "Row major linear FP32")],
        },
    ],
    "Bindings": ["img", "y"],
}
TRT10 = {
    "Layers": [
        {
            "Name": "__myl_Fused_0",
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Dimensions": [4, 8], "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "b", "Dimensions": [4, 8], "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_gemm_i8i8_i8i32_f32",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: /one/Conv]\x1f[ONNX Layer: /one/Relu]",
        },
        {
            "Name": "/two/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "b", "Dimensions": [4, 8], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "c", "Dimensions": [4, 8], "Format/Datatype": "Half"}],
            "Weights": {"Type": "Half", "Count": 4},
            "Metadata": "[ONNX Layer: /two/Conv]",
        },
        {
            "Name": "__myl_Soft_1",
            "LayerType": "kgen",
            "Inputs": [{"Name": "c", "Dimensions": [4], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "d", "Dimensions": [4], "Format/Datatype": "Float"}],
            "Metadata": "[ONNX Layer: /softmax/Softmax]",
        },
    ],
    "Bindings": ["a", "d"],
}


def tensor11(name: str, kind: str, form: str) -> dict:
    return {"Name": name, "Dimensions": [1, 8, 4, 4], "Format": form, "Datatype": kind}


TRT11 = {
    "Layers": [
        {
            "Name": "conv",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor11("img", "Int8", f"{WIDE} (kCHW32)")],
            "Outputs": [tensor11("y", "Half", "Row major linear FP16 format (kLINEAR)")],
            "Weights": {"Type": "Int8", "Count": 64},
            "Metadata": "[ONNX Layer: /one/Conv]",
        }
    ],
    "I/O Tensors": [
        {"Name": "img", "IOMode": "Input", "DataType": "Int8"},
        {"Name": "y", "IOMode": "Output", "DataType": "Half"},
    ],
}


def test_8_5_names_formats_precisions_and_fused_nodes():
    layers = read_layers(json.dumps(TRT8))
    assert [layer.precision for layer in layers] == ["fp32→int8", "int8", "fp16", "tf32", "fp32", "fp32"]
    assert (layers[0].inputs, layers[0].outputs) == (("fp32:chw",), ("int8:chw32",))
    assert layers[1].nodes == ("w1", "/w1/QuantizeLinear", "/one/Conv", "/one/Relu", "/one/Mul")
    assert layers[2].inputs == ("fp16:chw2",) and layers[4].inputs == ("fp32:hwc4",)


def test_10_names_nodes_in_metadata_and_types_alone():
    layers = read_layers(json.dumps(TRT10))
    assert [layer.precision for layer in layers] == ["int8", "fp16", "fp32"]
    assert layers[0].nodes == ("/one/Conv", "/one/Relu") and layers[0].inputs == ("int8",)
    # TensorRT writes the separators as they are, which strict JSON has not.
    assert read_layers(json.dumps(TRT10).replace("\\u001f", "\x1f")) == layers


def test_11_has_types_and_formats_apart():
    (layer,) = read_layers(TRT11)
    assert (layer.precision, layer.inputs, layer.outputs) == ("int8", ("int8:chw32",), ("fp16:chw",))
    assert read_io(TRT11) == read_io({"Bindings": ["img", "y"]}) == ["img", "y"]


def test_one_layers_json_names_alone_and_the_text_form_are_read():
    assert read_layers(json.dumps(TRT8["Layers"][1]))[0].precision == "int8"
    names = read_layers('{"Layers": ["/a/Conv + /a/Relu", "/b/Conv"], "Bindings": []}')
    assert [layer.nodes for layer in names] == [("/a/Conv", "/a/Relu"), ("/b/Conv",)] and names[0].precision == ""
    text = (
        "[V] [TRT] Layers:\n"
        f"Name: w + /w/QuantizeLinear + /one/Conv, LayerType: CaskConvolution, Inputs: [ {{ Name: a, Location: Device, Dimensions: "
        f"[1,8,4,4], Format/Datatype: {WIDE} }}], Outputs: [ {{ Name: b, Location: Device, Dimensions: [1,8,4,4], Format/Datatype: "
        'Row major linear FP16 format }], ParameterType: Convolution, Weights: {"Type": "Int8", "Count": 864}, TacticName: i8i8\n'
        "Name: /two/Softmax, LayerType: SoftMax, Inputs: [ { Name: b, Format/Datatype: Half }], Outputs: [ { Name: c, "
        "Format/Datatype: Half }]\n"
    )
    first, second = read_layers(text)
    assert (first.precision, first.inputs, first.outputs) == ("int8", ("int8:chw32",), ("fp16:chw",))
    assert first.nodes[-1] == "/one/Conv" and (second.type, second.precision) == ("SoftMax", "fp16")


@pytest.mark.parametrize("text", ["", "nothing of the kind", "3", '"text"'])
def test_what_is_no_inspectors_output_is_one_line(text):
    with pytest.raises(UserError, match="engine inspector"):
        read_layers(text)


def test_reformats_and_fallbacks_are_counted_and_named():
    quantized = ["/one/Conv", "/two/Conv", "/three/Conv", "/lost/Conv"]
    found = find(read_layers(TRT8), quantized)
    assert found.reformats == ("/quant/QuantizeLinear", "Reformatting CopyNode for Output Tensor 0 to /four/Conv")
    assert found.int8 == ("/one/Conv",)
    assert found.fallbacks == (("/two/Conv", "fp16"), ("/three/Conv", "tf32"))
    assert found.hidden == ("/lost/Conv",)
    said = "\n".join(found.lines())
    assert "6 layers, 2 of them reformats" in said and "1 of 4 quantized" in said
    assert "2 fell back: /two/Conv in FP16, /three/Conv in TF32" in said
    assert find(read_layers(TRT10), quantized).fallbacks == (("/two/Conv", "fp16"),)
    assert find(read_layers(TRT11), ["/one/Conv"]).int8 == ("/one/Conv",)


def test_a_plan_without_detail_hides_its_convolutions_rather_than_calling_them_fallen():
    found = find(read_layers('{"Layers": ["/one/Conv + /one/Relu"]}'), ["/one/Conv"])
    assert found.hidden == ("/one/Conv",) and not found.fallbacks


def test_times_join_by_name_and_the_table_shows_the_slowest():
    layers = with_times(read_layers(TRT8), {"/three/Conv": 3.0, "/two/Conv + /two/Add": 1.0, "elsewhere": 0.5})
    assert [layer.ms for layer in layers] == [None, None, 1.0, 3.0, None, None, 0.5]
    lines = table(layers, slowest=2)
    assert len(lines) == 3 and lines[0].split()[:3] == ["ms", "share", "precision"]
    assert "/three/Conv" in lines[1] and "66.7 %" in lines[1] and "tf32" in lines[1]
    assert "/two/Conv + /two/Add" in lines[2]
