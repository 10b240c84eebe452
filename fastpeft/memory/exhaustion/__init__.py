"""When memory runs out: an error that says what would need less, and a step that is run again with less."""
