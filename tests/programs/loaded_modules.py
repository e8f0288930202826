"""Imports MODULE... and prints the top-level names of all modules loaded by then, as JSON."""

import importlib
import json
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
