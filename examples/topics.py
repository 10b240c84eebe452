"""Text classification with Trainer: an encoder with a new head."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google-bert/bert-base-uncased")
parser.add_argument("--data", default="examples/data/topics.csv")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/topics-script")
options = parser.parse_args()

gpu = torch.cuda.is_available()
bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = load_dataset("csv", data_files=options.data, split="train").class_encode_column("label")
labels = rows.features["label"].names
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")
parts = rows.train_test_split(test_size=0.25, seed=0)

model = AutoModelForSequenceClassification.from_pretrained(
    options.model,
    num_labels=len(labels),
    id2label=dict(enumerate(labels)),
    label2id={label: number for number, label in enumerate(labels)},
)
adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(model, adapter)
fastpeft.accelerate(model)

trainer = Trainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=15,
        learning_rate=5e-4,
        logging_steps=5,
        per_device_train_batch_size=4,
        eval_strategy="epoch",
        bf16=bf16,
        fp16=gpu and not bf16,
    ),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=tokenizer,
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)
trainer.train()
trainer.save_model(options.output)
print(fastpeft.report(model))
