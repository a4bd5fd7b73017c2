"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Says in one sentence what is wrong and in the next how to mend it; shown without a traceback."""
