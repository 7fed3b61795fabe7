"""The two ways a command ends badly. Each message is one line that names the flag or file and what to do."""


class CaptionTrainError(Exception):
    """The command could not do its work (exit code 1)."""

    exit_code = 1


class UsageError(CaptionTrainError):
    """The command was asked for something it cannot do: a flag, a path or a combination (exit code 2)."""

    exit_code = 2
