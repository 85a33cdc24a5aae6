"""The exception for a mistake of the user, as opposed to a defect."""


class UserError(ValueError):
    """A mistake that the user can correct: one line that names it and says how to correct it.

    Commands print it without a traceback and exit with status 2.
    """
