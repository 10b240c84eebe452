"""Base models and adapters for the commands: found, checked, loaded."""
