"""How good a model is: figures over rows, each with its interval."""
