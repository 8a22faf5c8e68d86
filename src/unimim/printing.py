"""Makes names that come from files fit for a terminal: no escape sequence, line break or undecodable byte gets through."""


def printable(text: object) -> str:
    r"""The text with every character that cannot be printed written as Python writes it, such as `\n`, `\x1b` or `\udcff`.

    `\udcff` stands for the byte ff of a file name that is not UTF-8. What is printable already stays as it is.
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))
