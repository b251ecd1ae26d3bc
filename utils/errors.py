"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Report a user's mistake in one line: what, where, the rule, the remedy.

    Entry scripts print it without a stack trace and exit with code 2.
    """
