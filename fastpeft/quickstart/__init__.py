"""`fastpeft quickstart`: one small fine-tuning, run with plain PEFT and accelerated, and compared."""
