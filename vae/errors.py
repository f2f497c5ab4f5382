"""The one exception that carries a sentence for the person at the keyboard."""


class VAEError(Exception):
    """Something the user can act on, told in one sentence; entry points print it and exit with code 1."""
