"""Masked language modelling with Trainer: an encoder learns a field's language."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--data", default="examples/data/texts.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/masked-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns="text")

model = AutoModelForMaskedLM.from_pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
fastpeft.accelerate(model)

trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=10,
        learning_rate=2e-4,
        logging_steps=5,
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=True),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(options.output)
print(fastpeft.report(model))
