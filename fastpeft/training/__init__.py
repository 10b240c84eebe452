"""`fastpeft train`: from a configuration to a saved adapter, with transformers' Trainer or TRL's SFTTrainer."""
