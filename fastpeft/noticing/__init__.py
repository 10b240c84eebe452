"""Training that runs but goes wrong is noticed, once, with what to do."""
