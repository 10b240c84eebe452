"""Fine-tuning strategies: one file each, over a common run (`run.py`)."""
