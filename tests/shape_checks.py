"""The type checker behind the shape checks of tests: beartype, accepting an int for a float as mypy does."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
