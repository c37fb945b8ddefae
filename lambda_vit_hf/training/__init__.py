"""Dilution and removal inside the Trainer, and the main job around it."""
