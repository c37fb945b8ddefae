"""The model card, and pushing to the Hub."""
