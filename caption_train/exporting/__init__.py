"""The export command: writes an adapter or a model in another form, and checks the result."""
