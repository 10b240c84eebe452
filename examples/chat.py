"""Chats with TRL: a decoder learns the assistant's turns, its base stored in 4 bits."""

import argparse

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
parser.add_argument("--data", default="examples/data/chat.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/chat-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if bf16 else torch.float16 if gpu else torch.float32

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    dtype=dtype,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ),
    device_map={"": PartialState().device},  # of several processes each has a GPU of its own
)
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
        per_device_train_batch_size=4,
        max_length=1024,
        assistant_only_loss=True,
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train"),
    processing_class=tokenizer,
)
for parameter in model.parameters():
    if parameter.requires_grad:  # TRL made it bfloat16, which float16's gradient scaling refuses
        parameter.data = parameter.data.float()
trainer.train()
trainer.save_model(options.output)
print(fastpeft.report(model))
