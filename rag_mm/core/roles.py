"""What a target token is to the loss; values of a row's `roles`."""

IGNORED = 0  # padding and sentinels
MAIN = 1  # the document being modelled
RETRIEVED = 2  # a document that retrieval put before it
