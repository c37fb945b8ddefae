"""Which attention layers a model can do without: entropy, masked passes, search, strategies."""
