"""Errors of radiance. Every error that a user can cause derives from `RadianceError`."""


class RadianceError(Exception):
    """Base class of all errors that a user can cause; the message says what is wrong and what to do."""


class ConfigError(RadianceError, ValueError):
    """A setting that cannot work; the message says which one and what to do."""


class CheckpointError(RadianceError, ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what was wrong and what to do.

    It is one line, whatever the names in a file are.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class DataError(RadianceError, ValueError):
    """Data that cannot be used; the message says what is wrong and what to do."""


class TextError(RadianceError, ValueError):
    """A prompt that cannot be encoded; the message says which and what to do."""


class TrainingError(RadianceError, RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


class OutputError(RadianceError, OSError):
    """An output that cannot be written, or a damaged output file of a run."""
