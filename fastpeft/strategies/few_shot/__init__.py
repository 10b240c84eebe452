"""Few-shot fine-tuning: a handful of labelled texts a class."""
