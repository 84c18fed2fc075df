"""What arguments may be, for the parser: copies of what modules know that import torch; a test compares them."""

FORMATS = ("auto", "mxfp4_compile", "gpt_oss", "compressed_tensors", "mxfp4")
SCALE_RULES = ("floor", "even", "round_up", "mse")
DEFAULT_SCALE_RULE = "mse"
DEMO_TOKENS = 240
DEMO_MAX_TOKENS = 960  # with the prompt, within the context the demo's model was trained on
CALIBRATION_TOKENS = 524288
CALIBRATION_WINDOW = 2048
