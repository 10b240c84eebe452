"""Multi-task fine-tuning: several tasks on one base, in batches that mix them."""
