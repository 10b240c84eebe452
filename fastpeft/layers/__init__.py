"""Drop-in modules: they choose an op and hold no kernel."""
