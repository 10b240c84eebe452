"""The tests of the seams to other packages, with the oldest, a middle and the newest supported version of each."""
