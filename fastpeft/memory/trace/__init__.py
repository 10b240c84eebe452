"""A step of a model without values, followed operation by operation: which bytes are alive when."""
