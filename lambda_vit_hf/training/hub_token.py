"""The Hub's token among a Trainer's arguments, which the Trainer writes to `training_args.bin`."""


class UnwrittenToken(str):
    """A token that is used as any text, and `None` in whatever is pickled."""

    __slots__ = ()

    def __reduce__(self):
        return type(None), ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


def keep_token_unwritten(args) -> None:
    """From now on these `TrainingArguments` can be written without `hub_token`; who has them can still push."""
    if args.hub_token is not None:
        args.hub_token = UnwrittenToken(args.hub_token)
