"""How a target token counts in the loss: the values of a sequence's `roles`."""

IGNORED = 0  # padding and sentinels
MAIN = 1  # the main document
RETRIEVED = 2  # a retrieved document before the main document
