"""The embedded default: a sample set, tiny base models, and the code that makes both."""
