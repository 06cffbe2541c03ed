"""Names of the formats and types that models are written in, readable without JAX."""

EXPORT_FORMATS = ("native", "diffusers", "gguf", "torch")
LORA_NAMINGS = ("peft", "kohya", "diffusers")  # names of the tensors in LoRA files
FOLDER_FORMATS = ("diffusers", "torch")  # the others are single files
FORMATS_BY_SUFFIX = {".safetensors": "native", ".gguf": "gguf"}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
