"""The exception for user errors; entry points print its message and exit with 1."""


class VAEError(Exception):
    """Something the user can act on, stated in one sentence."""
