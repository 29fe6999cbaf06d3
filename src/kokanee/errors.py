"""The one exception that users are meant to see."""


class KokaneeError(ValueError):
    """A mistake in the input: its text says the problem, the reason and the remedy."""
