"""Prompts and completions with TRL: a decoder learns the completions."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B-Base")
parser.add_argument("--data", default="examples/data/instructions.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/instructions-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if bf16 else torch.float16 if gpu else torch.float32

model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
fastpeft.accelerate(model)

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=3,
        learning_rate=2e-4,
        logging_steps=1,
        max_length=512,
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)
trainer.train()
trainer.save_model(options.output)
print(fastpeft.report(model))
