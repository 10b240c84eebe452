"""Memory by plan: what a training will take, and how each layer is made to take less."""
