"""Names that the command line offers and packages above implement."""

EXPORT_FORMATS = ("native", "diffusers", "gguf", "torch")  # formats of models (weights/convert.py)
LORA_NAMINGS = ("peft", "kohya")  # names of tensors in LoRA files (weights/lora.py)
PROMPT_SUITES = (
    "geneval",
    "dpg",
    "coco30k",
)  # public sets of prompts (evaluation/prompt_suites.py)
