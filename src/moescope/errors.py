"""The one exception that means "the user can mend this", and what its sentences are made of."""


def counted(number: int, noun: str) -> str:
    """How many there are: `1 tensor`, `2 tensors`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class UserError(Exception):
    """A mistake or a limit outside the program, told in one sentence.

    The message names the thing, the value and the way out. The command line prints it on
    stderr and exits with code 2; a server answers with a 4xx status. Anything else that
    escapes is a defect of moescope and keeps its traceback.

    Attributes:
        code: what went wrong in a word, for those who say it in another language; "" where nobody
            does.
        values: what the sentence names, by the words that its translations use.
    """

    def __init__(self, message: str, code: str = "", **values: str | int) -> None:
        super().__init__(message)
        self.code, self.values = code, values
