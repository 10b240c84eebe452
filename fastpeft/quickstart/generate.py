"""Text from a saved adapter, with transformers and peft alone; run as a script, so that fastpeft is nowhere near.

Reads {"model", "adapter", "dtype", "quantization", "device", "prompt", "tokens"} from the file named first, writes
{"base", "tuned", "loaded_fastpeft"} to the file named second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

request = json.loads(Path(sys.argv[1]).read_text())
dtype = getattr(torch, request["dtype"])
options = {"dtype": dtype}
if request["quantization"] == "nf4":
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
if request["device"] == "cuda":
    options["device_map"] = {"": 0}
tokenizer = AutoTokenizer.from_pretrained(request["model"])
base = AutoModelForCausalLM.from_pretrained(request["model"], use_safetensors=True, **options)
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        # bitsandbytes' own form of the weights for some CPUs; it fails where rows are no multiple of the block size.
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, request["adapter"]).eval()

bos = "" if tokenizer.bos_token is None else tokenizer.bos_token
inputs = tokenizer(bos + request["prompt"], return_tensors="pt", add_special_tokens=False).to(model.device)
inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def continued() -> str:
    ids = model.generate(
        **inputs,
        max_new_tokens=request["tokens"],
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


with model.disable_adapter():
    base_text = continued()
found = {
    "base": base_text,
    "tuned": continued(),
    "loaded_fastpeft": any(name.partition(".")[0].startswith("fastpeft") for name in sys.modules),
}
Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
