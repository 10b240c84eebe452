"""What is trained on: rows from files, folders and the hub, their columns, and their tokens."""
