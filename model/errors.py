"""What goes wrong with a checkpoint, said to the person who gave it."""


class CheckpointError(ValueError):
    """A model directory that cannot be served as it is. The message names the file, field or tensor and what to do."""
