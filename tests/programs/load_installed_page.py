"""Loads a config page from the rag_mm installed in FOLDER; prints the first character of its JSON."""

import sys


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import rag_mm
    from rag_mm.core import configuration

    assert rag_mm.__file__.startswith(folder), rag_mm.__file__
    print(configuration.load_config("configs/quickstart.py:tiny").to_json()[:1])


main(sys.argv[1])
