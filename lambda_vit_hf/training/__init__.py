"""Dilution and removal inside the Trainer, and the training program."""
