"""What a process holds while it goes on and on: see `__main__`."""
