"""Dynamic fine-tuning: what is trained, how strongly and on which data changes in response to measured signals.

The definition is ours. A controller (`controller.py`) asks rules (`actions/`, one file each) at each step; a rule looks
at a signal (`signals.py`) and acts on what is trained (`trained.py`), on the loss (`trainer.py`) or on the run.
"""
