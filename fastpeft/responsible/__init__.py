"""Checks of what a tuned model does that its loss does not show: what it repeats, and whom it fails."""
