"""`fastpeft compare`: ways to fine-tune, side by side under one protocol."""
