"""`python -m rag_mm` is the command `rag-mm`."""

import sys

from rag_mm.cli import main

if __name__ == "__main__":
    sys.exit(main.main())
