"""The installed programs; each imports what is heavy only when it runs."""
