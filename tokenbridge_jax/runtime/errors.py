"""The one exception that stands for a user's mistake rather than a defect."""


class UserError(Exception):
    """A mistake the user can mend: one line that names the thing and the mend.

    Commands print it without a traceback and exit with status 2.
    """
