"""Translation with Seq2SeqTrainer: an encoder-decoder reads the prompt and writes the completion."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google-t5/t5-small")
parser.add_argument("--data", default="examples/data/translations.jsonl")
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--output", default="runs/translation-script")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
rows = load_dataset("json", data_files=options.data, split="train")
rows = rows.map(
    lambda row: tokenizer(row["prompt"], text_target=row["completion"], truncation=True, max_length=256),
    remove_columns=rows.column_names,
)

model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
fastpeft.accelerate(model)

trainer = Seq2SeqTrainer(
    model,
    Seq2SeqTrainingArguments(
        options.output,
        max_steps=options.max_steps,
        num_train_epochs=5,
        learning_rate=1e-3,
        logging_steps=5,
        # without it in float32: T5 may overflow in float16
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
    ),
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model.get_base_model()),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(options.output)
print(fastpeft.report(model))
