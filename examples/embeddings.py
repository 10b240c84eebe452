"""Sentence embeddings with sentence-transformers: questions come near to the texts that answer them."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument("--data", default="examples/data/questions.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/embeddings-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

rows = load_dataset("json", data_files=options.data, split="train").select_columns(["question", "context"])

model = SentenceTransformer(options.model, model_kwargs={"dtype": torch.float32})
model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType.FEATURE_EXTRACTION))
fastpeft.accelerate(model)

trainer = SentenceTransformerTrainer(
    model,
    SentenceTransformerTrainingArguments(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=10,
        per_device_train_batch_size=16,
        batch_sampler="no_duplicates",
        learning_rate=2e-4,
        logging_steps=5,
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=rows,
    loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=8),
)
trainer.train()
model.save_pretrained(options.output)
print(fastpeft.report(model))
