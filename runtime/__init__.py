"""The base of every script. Nothing here depends on diffusion."""


class UserError(ValueError):
    """An error that the user can fix. Any other exception, except an OSError, is a bug in this code and keeps its traceback.

    The message says what is wrong with a value and what is allowed. It writes parameters in backticks, for example
    "`cfg_scale` -1 is not …". `cli.run` shows them as flags if the script has a flag of that name.
    """
