"""What our mappings say to nodes for other models that ask them for entries of those."""


class ForeignEntryError(KeyError):
    """An entry that only other models have. The text is a sentence, which a KeyError would put in quotes."""

    def __str__(self) -> str:
        return str(self.args[0])
