"""What every script stands on. Nothing here knows of diffusion."""


class UserError(ValueError):
    """What a user can mend. Any other exception but an OSError is a bug of ours, and keeps its traceback.

    The message says what is wrong with a value and what is allowed. It writes parameters in backticks, as in
    "`cfg_scale` -1 is not …": `cli.run` shows them as flags where the script has a flag of that name.
    """
