"""The protobuf messages of the Open Inference Protocol v2, made at run time from what the protocol says of them.

No generated code is kept, so any protobuf runtime does. The names and numbers are those of the protocol's service
`inference.GRPCInferenceService`, as KServe and Triton speak it.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_TENSOR = "name=1:string datatype=2:string shape=3:int64*"
_PARAMETERS = "parameters={}:InferParameter%"
# Message -> fields as name=number:type; * is repeated, % a map from string. A dot nests a message in another.
_MESSAGES = {
    "InferParameter": "bool_param=1:bool int64_param=2:int64 string_param=3:string double_param=4:double "
    "uint64_param=5:uint64",
    "InferTensorContents": "bool_contents=1:bool* int_contents=2:int32* int64_contents=3:int64* "
    "uint_contents=4:uint32* uint64_contents=5:uint64* fp32_contents=6:float* fp64_contents=7:double* "
    "bytes_contents=8:bytes*",
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live=1:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready=1:bool",
    "ModelReadyRequest": "name=1:string version=2:string",
    "ModelReadyResponse": "ready=1:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name=1:string version=2:string extensions=3:string*",
    "ModelMetadataRequest": "name=1:string version=2:string",
    "ModelMetadataResponse": "name=1:string versions=2:string* platform=3:string "
    "inputs=4:ModelMetadataResponse.TensorMetadata* outputs=5:ModelMetadataResponse.TensorMetadata*",
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelInferRequest": f"model_name=1:string model_version=2:string id=3:string {_PARAMETERS.format(4)} "
    "inputs=5:ModelInferRequest.InferInputTensor* outputs=6:ModelInferRequest.InferRequestedOutputTensor* "
    "raw_input_contents=7:bytes*",
    "ModelInferRequest.InferInputTensor": f"{_TENSOR} {_PARAMETERS.format(4)} contents=5:InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": f"name=1:string {_PARAMETERS.format(2)}",
    "ModelInferResponse": f"model_name=1:string model_version=2:string id=3:string {_PARAMETERS.format(4)} "
    "outputs=5:ModelInferResponse.InferOutputTensor* raw_output_contents=6:bytes*",
    "ModelInferResponse.InferOutputTensor": f"{_TENSOR} {_PARAMETERS.format(4)} contents=5:InferTensorContents",
}
_ONE_OF = {"InferParameter": "parameter_choice"}
_Field = descriptor_pb2.FieldDescriptorProto
#: Methods of the service; each takes METHODRequest and answers METHODResponse.
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")


def _add_field(message, text: str, one_of: bool) -> None:
    name, _, rest = text.partition("=")
    number, _, kind = rest.partition(":")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind[-1] in "*%":
        field.label = _Field.LABEL_REPEATED
    if kind[-1] == "%":
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key=1:string", False)
        _add_field(entry, f"value=2:{kind[:-1]}", False)
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{message.name}.{entry.name}"
        return
    kind = kind.rstrip("*")
    if kind in _MESSAGES:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")
    if one_of:
        field.oneof_index = 0


def _classes() -> dict[str, type]:
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made = {}
    for name in sorted(_MESSAGES, key=lambda name: name.count(".")):
        outer, _, inner = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
    for name, fields in _MESSAGES.items():
        if name in _ONE_OF:
            made[name].oneof_decl.add(name=_ONE_OF[name])
        # A map's entry is named by its message's full name.
        outer = name.rpartition(".")[0]
        for text in fields.split():
            _add_field(made[name], text, name in _ONE_OF)
            if text.endswith("%") and outer:
                made[name].field[-1].type_name = f".{PACKAGE}.{name}.{made[name].nested_type[-1].name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


#: Message name -> its class.
MESSAGES = _classes()
