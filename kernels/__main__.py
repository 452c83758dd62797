"""Show for which definitions the forms of this folder were written: see kernels/__init__.py."""

import importlib

from kernels import FORMS
from parts import cli, ops

rows = [("operation", "definition now", "forms are for", "")]
for name, form in FORMS.items():
    module, _, function = name.rpartition(".")
    now = ops.definition(getattr(importlib.import_module(module), function))
    rows.append((name, now, form.definition, "" if now == form.definition else "plain form runs"))
print(cli.markdown(rows))
