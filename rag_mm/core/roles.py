"""How a target token counts in the loss: the values of a sequence's `roles`."""

IGNORED = 0  # padding
MAIN = 1  # the main document
RETRIEVED = 2  # a retrieved document before the main document
SENTINEL = 3  # where a masked span was, or opens it at the end; of any document
