"""Quantized linear layers on a CPU, ours and others': many of one shape, each with a weight of its own.

An implementation packs its weights once and then takes inputs:

    passes = IMPLS[name](tensors, num_threads)     QuantizedTensor of 4 bits, all of one shape
    run = passes(x)                                x (M, in) FP32
    outputs = run()                                one product with every weight, in order: (M, out) each

Each is used as its users would: ours and torch's operators are called layer by layer from Python; ONNX Runtime and
OpenVINO run one graph that has all layers as nodes, so that their call costs once and not once a layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grace_vlm.kernels.int4pack import int4pack_linear, pack_int4
from grace_vlm.kernels.low_bit_cpu import PanelLinear, pack_panels, panel_linear
from grace_vlm.quant.affine import dequantize
from grace_vlm.quant.packing import to_unsigned
from grace_vlm.quant.scheme import QuantizedTensor

Outputs = Sequence[torch.Tensor]
Run = Callable[[], Outputs]
Passes = Callable[[torch.Tensor], Run]


def ours(tensors: Sequence[QuantizedTensor], num_threads: int, exact: bool) -> Passes:
    packed = [pack_panels(tensor) for tensor in tensors]
    return lambda x: lambda: [panel_linear(x, one, exact=exact, threads=num_threads) for one in packed]


def ours_int8(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    return ours(tensors, num_threads, exact=False)


def ours_fp32(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    return ours(tensors, num_threads, exact=True)


def torch_int4pack(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    torch.set_num_threads(num_threads)
    packed = [pack_int4(replace(tensor, scale=tensor.scale.bfloat16())) for tensor in tensors]

    def passes(x: torch.Tensor) -> Run:
        rounded = x.bfloat16()
        return lambda: [int4pack_linear(rounded, one) for one in packed]

    return passes


def torch_fp32(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    torch.set_num_threads(num_threads)
    weights = [dequantize(tensor.codes, tensor.scale, torch.float32) for tensor in tensors]
    return lambda x: lambda: [torch.nn.functional.linear(x, weight) for weight in weights]


def onnx_bytes(tensor: QuantizedTensor) -> torch.Tensor:
    """uint8 (out, groups, group / 2) of MatMulNBits: codes + 8, the even input in the lower half."""
    unsigned = to_unsigned(tensor.codes, 4).view(*tensor.scale.shape, -1)
    return unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def onnx_graph(tensors: Sequence[QuantizedTensor]) -> bytes:
    """One input, and a node and an output for every weight. Equal weights would become one: they must differ."""
    from onnx import TensorProto, helper, numpy_helper

    (out_features, in_features), group = tensors[0].shape, tensors[0].scheme.group_size
    nodes, weights, outputs = [], [], []
    for number, tensor in enumerate(tensors):
        codes, scale, output = f"codes{number}", f"scale{number}", f"y{number}"
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", codes, scale], [output], domain="com.microsoft",
                K=in_features, N=out_features, bits=4, block_size=group, accuracy_level=4,
            )
        )  # fmt: skip
        weights.append(numpy_helper.from_array(onnx_bytes(tensor).numpy(), codes))
        weights.append(numpy_helper.from_array(tensor.scale.float().numpy(), scale))
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["M", out_features]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", in_features])
    graph = helper.make_graph(nodes, "layers", [x], outputs, weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return model


def onnxruntime_l4(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Its threads wait awake between the nodes of a run, which is the faster way, and not after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx_graph(tensors), options, providers=["CPUExecutionProvider"])

    def passes(x: torch.Tensor) -> Run:
        given = {"x": x.numpy()}
        return lambda: [torch.from_numpy(output) for output in session.run(None, given)]

    return passes


def openvino_bytes(tensor: QuantizedTensor) -> torch.Tensor:
    """uint8 (out, in / 2) of i4: two's complement, the even input in the lower half."""
    halves = tensor.codes.view(torch.uint8) & 15
    return halves[:, 0::2] | halves[:, 1::2] << 4


def openvino(tensors: Sequence[QuantizedTensor], num_threads: int) -> Passes:
    import numpy as np
    from openvino import Core, Model, Tensor, Type
    from openvino import opset13 as ops

    (out_features, in_features), group = tensors[0].shape, tensors[0].scheme.group_size
    shape = (out_features, in_features // group, group)
    x = ops.parameter([-1, in_features], np.float32)
    outputs: list[Any] = []
    for tensor in tensors:
        # A Tensor of such a type holds no reference to the memory that it is made of, so the constant takes a copy.
        codes = openvino_bytes(tensor).contiguous().numpy()
        integers = ops.convert(ops.constant(Tensor(codes, list(shape), Type.i4), shared_memory=False), "f32")
        weight = ops.multiply(integers, ops.constant(tensor.scale.float().numpy()[:, :, None]))
        flat = ops.reshape(weight, np.array([out_features, in_features]), special_zero=False)
        outputs.append(ops.matmul(x, flat, transpose_a=False, transpose_b=True))
    settings = {"INFERENCE_NUM_THREADS": num_threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = Core().compile_model(Model(outputs, [x]), "CPU", settings).create_infer_request()

    def passes(x: torch.Tensor) -> Run:
        given = Tensor(x.numpy(), shared_memory=False)

        def run() -> Outputs:
            request.set_input_tensor(given)
            request.infer()
            return [torch.from_numpy(request.get_output_tensor(k).data) for k in range(len(outputs))]

        return run

    return passes


IMPLS: dict[str, Callable[[Sequence[QuantizedTensor], int], Passes]] = {
    "ours_int8": ours_int8,
    "ours_fp32": ours_fp32,
    "torch_int4pack": torch_int4pack,
    "onnxruntime_l4": onnxruntime_l4,
    "openvino": openvino,
    "torch_fp32": torch_fp32,
}
ALLOWED = {
    "ours_int8": 0.02,
    "ours_fp32": 1e-5,
    "torch_int4pack": 0.01,
    "onnxruntime_l4": 0.02,
    "openvino": 0.02,
    "torch_fp32": 1e-5,
}
"""|y - x W^T| / |x W^T|: activations of 8 bits (OpenVINO's too, where it takes them), BF16 ones, FP32."""
PACKAGES = {"onnxruntime_l4": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
"""What an implementation needs that torch does not bring."""


def missing(name: str) -> list[str]:
    """Packages of ``name`` that are not installed."""
    return [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]


def panels(tensors: Sequence[QuantizedTensor]) -> list[PanelLinear]:
    """Our packed weights, whose bytes are what ``read`` reads."""
    return [pack_panels(tensor) for tensor in tensors]
