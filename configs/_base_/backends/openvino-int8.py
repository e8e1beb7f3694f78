backend_config = dict(type="openvino", precision="int8")
