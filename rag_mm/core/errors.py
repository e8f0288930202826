"""The one exception that means "the user can mend this": commands turn it into exit code 2."""


class UserError(Exception):
    """A mistake in what was asked for; its message is one sentence naming the value and the remedy."""
