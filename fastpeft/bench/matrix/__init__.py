"""The coverage matrix: families of transformers × bases × methods × modes, each held against plain PEFT."""
