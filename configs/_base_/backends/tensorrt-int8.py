# For TensorRT from 10 on: the types in the graph fix the precision, and coordinates stay FP32. Without strongly_typed the builder
# chooses, and earlier releases take the graph.
_base_ = "./tensorrt.py"
backend_config = dict(common_config=dict(fp16_mode=True, int8_mode=True, strongly_typed=True))
