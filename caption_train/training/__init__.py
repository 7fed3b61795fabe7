"""The training command: prepares a run, trains, validates, saves and resumes."""
