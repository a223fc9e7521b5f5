"""The one exception for what a user can mend."""


class UserError(Exception):
    """The user's input or configuration is wrong.

    Its text is one line: what is wrong, where, and how to mend it. The command line prints it without a
    traceback and exits with code 2. Everything else that is raised is a fault of ours and keeps its traceback.
    """

    def __init__(self, text: str) -> None:
        # What a user typed may hold line breaks.
        super().__init__(" ".join(text.splitlines()))
