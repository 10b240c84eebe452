"""Preferences with TRL's DPOTrainer: the chosen answer is made likelier than the rejected one."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default="examples/data/preferences.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/preferences-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if bf16 else torch.float16 if gpu else torch.float32

model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
fastpeft.accelerate(model)

trainer = DPOTrainer(  # copies the adapter and keeps the copy as it is, for the reference
    model,
    args=DPOConfig(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=3,
        learning_rate=5e-5,
        logging_steps=1,
        per_device_train_batch_size=4,
        max_length=512,
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
trainer.train()
model.save_pretrained(options.output, selected_adapters=["default"])
print(fastpeft.report(model))
