"""The order of a target's pictures, nearest first: one for the judge's loop, run.json and pages."""

UNREADABLE = 16.0  # the greatest |ΔV| + |ΔA|, for a picture whose answer cannot be read


def rank(loss, round, index):
    """The key to sort pictures by: the least loss first.

    A judge says few different numbers, so losses are often equal. Then the later round comes first,
    because its prompt has been improved, and in a round the picture that was drawn first.
    loss: None for an answer that cannot be read.
    """
    return (UNREADABLE if loss is None else loss, -round, index)
