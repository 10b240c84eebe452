"""Models whose frozen weights are quantised once and read from the user's cache afterwards."""
