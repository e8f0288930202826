"""The exception for errors that the user can fix; commands report it and exit with code 2."""


class UserError(Exception):
    """A user error; its message is one sentence that names the value and the remedy."""
