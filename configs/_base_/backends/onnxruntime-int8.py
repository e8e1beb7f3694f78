backend_config = dict(type="onnxruntime", precision="int8")
